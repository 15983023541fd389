"""The dashboard and the alerts as files. integration/test_monitoring.py checks that a worker has their metrics."""

import re

import yaml

from scripts.documents import alerts
from tests.support.monitoring import DOCKER, PROMETHEUS, dashboards, selectors
from worker.amqp.topology import Topology
from worker.settings import Settings

SETTINGS = Settings.model_fields
QUEUES = {queue.name for queue in Topology(SETTINGS["worker_namespace"].default, (5,)).queues()}


def test_each_alert_has_a_severity_a_meaning_and_an_action() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert set(rule["annotations"]) == {"summary", "meaning", "action"}


def test_each_alert_has_a_rule_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    """promtool runs the rule tests in tests/containers; this test checks that none is missing."""
    tests = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    asked = [test["promql_expr_test"] for test in tests]
    fired = re.findall(r'alertname="(\w+)"', str(asked))
    assert set(fired) == {rule["alert"] for rule in alerts()}
    assert all(any(not ask["exp_samples"] for ask in asks) for asks in asked)


def test_each_queue_in_an_expression_is_in_the_topology() -> None:
    for selector in selectors():
        for label, operator, text in selector.matchers:
            if label == "queue":
                wanted = re.escape(text) if operator == "=" else text
                assert any(re.fullmatch(wanted, queue) for queue in QUEUES), text


def test_the_dashboard_uses_the_provisioned_data_source() -> None:
    sources = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    known = {source["uid"] for source in sources}
    for dashboard in dashboards():
        asked = re.findall(r"'datasource': \{'type': 'prometheus', 'uid': '([^']*)'\}", str(dashboard))
        assert set(asked) == known
        assert len(asked) == str(dashboard).count("'datasource'")


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    for dashboard in dashboards():
        panels = dashboard["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        covered = [
            (column, line)
            for place in (panel["gridPos"] for panel in panels)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        ]
        assert len(covered) == len(set(covered))


def test_prometheus_scrapes_the_port_of_the_worker() -> None:
    jobs = {
        job["job_name"]: job for job in yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    }
    (found,) = jobs["onenet-worker"]["dns_sd_configs"]
    assert found["port"] == SETTINGS["http_port"].default
    asked = {text for one in selectors() for label, _, text in one.matchers if label == "job"}
    assert asked <= set(jobs)
