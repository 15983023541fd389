"""What the dashboard and the alerts ask Prometheus."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.documents import alerts

DOCKER = Path(__file__).parents[2] / "docker"
PROMETHEUS = DOCKER / "prometheus"
DASHBOARDS = DOCKER / "grafana" / "dashboards"
_SELECTOR = re.compile(r"\b((?:onenet_worker|rabbitmq|process)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Selector:
    """One metric in an expression, and what is asked of its labels: label, operator, text."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


def dashboards() -> Iterator[dict[str, Any]]:
    """Yield every dashboard."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        yield json.loads(path.read_text())


def expressions() -> Iterator[str]:
    """Yield every expression, with Grafana's variables replaced as it would."""
    for rule in alerts():
        yield rule["expr"]
    for dashboard in dashboards():
        for variable in dashboard["templating"]["list"]:
            yield variable["query"]["query"].removeprefix("label_values(").partition(",")[0]
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                text = target["expr"].replace("$__rate_interval", "1m").replace("$__range", "1h")
                yield text.replace("$instance", ".*")


def selectors() -> set[Selector]:
    """Return every metric that is asked for, and how."""
    return {
        Selector(name, tuple(_MATCHER.findall(matchers)))
        for text in expressions()
        for name, matchers in _SELECTOR.findall(text)
    }
