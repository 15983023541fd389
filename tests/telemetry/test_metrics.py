"""The names and labels of metrics that dashboards and alerts depend on."""

from worker.telemetry.metrics import Metrics


def test_retries_and_postponements_are_counted_separately() -> None:
    """Only a retry uses up an attempt."""
    metrics = Metrics("1.2.3", 1)
    metrics.count_retry()
    metrics.count_postponement()
    metrics.count_postponement()
    assert metrics.registry.get_sample_value("onenet_worker_retries_total") == 1
    assert metrics.registry.get_sample_value("onenet_worker_postponements_total") == 2


def test_build_info_has_the_version_as_a_label() -> None:
    metrics = Metrics("1.2.3", 1)
    assert metrics.registry.get_sample_value("onenet_worker_build_info", {"version": "1.2.3"}) == 1


def test_the_duration_of_requests_has_a_series_for_each_result_from_the_start() -> None:
    metrics = Metrics("1.2.3", 1)
    name = "onenet_worker_request_duration_seconds_count"
    for result in ("cached", "refused", "not_sent", "in_doubt"):
        assert metrics.registry.get_sample_value(name, {"result": result}) == 0
