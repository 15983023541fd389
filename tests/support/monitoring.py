"""The queries of the dashboard and of the alerts."""

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
    """One metric in an expression, with its label matchers: label, operator, text."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


def dashboards() -> Iterator[dict[str, Any]]:
    """Yield every dashboard."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        yield json.loads(path.read_text())


def expressions() -> Iterator[str]:
    """Yield every expression, with Grafana's variables replaced."""
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
    """Return every metric that an expression queries, with its label matchers."""
    return {
        Selector(name, tuple(_MATCHER.findall(matchers)))
        for text in expressions()
        for name, matchers in _SELECTOR.findall(text)
    }
