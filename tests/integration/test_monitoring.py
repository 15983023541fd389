"""The metrics of a worker and the queries of dashboard and alerts agree."""

import re

import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.support.deployment import Deployment
from tests.support.monitoring import selectors
from tests.support.waiting import PATIENCE_S
from worker.dev.services.ports import free_port

FREE = {"instance", "job"}  # labels that Prometheus adds


def test_a_new_worker_exports_every_series_that_dashboard_and_alerts_query(deployment: Deployment) -> None:
    """The label values too: if a series only appears with its first event, its first increase is not seen."""
    port = free_port()
    with deployment.worker(HTTP_PORT=str(port)):
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S).text
    shown = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for selector in selectors():
        if selector.name.startswith("rabbitmq_"):
            continue
        found = [sample for sample in shown if sample.name == selector.name]
        assert found, selector.name
        for label, operator, text in selector.matchers:
            if label not in FREE:
                values = {sample.labels[label] for sample in found}
                wanted = re.split(r"\|", text) if "~" in operator else [text]
                assert values >= set(wanted), selector
