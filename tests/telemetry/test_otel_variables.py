"""The variables of OpenTelemetry: an unusable one stops the start like any setting, and is not quoted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from worker.errors import EXIT_CONFIG

SECRET = "S3cretKey"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", SECRET, "OTEL_ATTRIBUTE_COUNT_LIMIT: "),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT: "),
        ("OTEL_BSP_MAX_QUEUE_SIZE", SECRET, "OTEL_BSP_MAX_QUEUE_SIZE: "),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "max_queue_size must be a positive integer"),
        ("OTEL_EXPORTER_OTLP_HEADERS", SECRET, "Header format invalid"),
        ("OTEL_EXPORTER_OTLP_HEADERS", f"a=b,{SECRET}", "Header format invalid"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", SECRET, "Invalid timeout value"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", SECRET, "Unsupported compression type"),
        ("OTEL_RESOURCE_ATTRIBUTES", f"a=b,{SECRET}", "Invalid key value resource attribute pair"),
        ("OTEL_TRACES_SAMPLER", SECRET, "recognize sampler"),
    ],
)
def test_an_unusable_variable_of_opentelemetry_stops_the_start_in_one_line(
    name: str, value: str, said: str, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "ONENET_API_KEY": "k",
        "HTTP_PORT": "0",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        name: value,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "worker", "run"],
        check=False,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    [line] = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (EXIT_CONFIG, "")
    assert line.startswith("onenet-worker: OTEL_")
    assert said in line
    assert SECRET.lower() not in line.lower()
