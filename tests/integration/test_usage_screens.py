"""What a person sees of wrong input, of misspelt settings, of the help and of the topology."""

import shlex
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.deployment import Deployment
from tests.support.proxies import Proxy
from tests.support.terminal import assert_screen, show

MISTAKES: dict[str, tuple[tuple[str, ...], ...]] = {
    "names": (
        ("stauts", "order-17"),
        ("dead-letters", "shwo"),
        ("status",),
        ("status", "order-17", "--sorce", "billing"),
    ),
    "values": (
        ("status", "order 17"),
        ("device", "86582003000000"),
        ("device", "865820030000001", "--limit", "0"),
        ("device", "865820030000001", "--cancel", "4274", "--cancel-all"),
        ("send", "--imei", "865820030000001", "--retry", "many"),
        ("dead-letters", "list", "--reason", "expire"),
        ("dead-letters", "list", "--newer-than", "yesterday"),
        ("dead-letters", "replay", "--all", "--rate", "fast"),
        ("pause", "--product", "heating", "--default-product"),
        ("simulator", "--fault", "explode"),
    ),
    "choices": (
        ("dead-letters", "replay"),
        ("dead-letters", "discard", "--all", "--reason", "expired"),
        ("unrouted", "publish"),
        ("unrouted", "discard", "--all", "--key", "a"),
    ),
}


def said_to(arguments: tuple[str, ...], folder: Path, columns: int, **settings: str) -> str:
    screen = show(arguments, folder, settings, columns=columns)
    return f"$ onenet-worker {shlex.join(arguments)}\n{screen.text}(exit code {screen.exit_code})\n"


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_said_with_what_would_be_right(kind: str, columns: int, tmp_path: Path) -> None:
    screens = [said_to(arguments, tmp_path, columns) for arguments in MISTAKES[kind]]
    assert_screen(f"usage-{kind}-{columns}", "\n".join(screens))


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_fits_on_the_screen(columns: int, tmp_path: Path) -> None:
    assert_screen(f"help-{columns}", said_to(("--help",), tmp_path, columns))


@pytest.mark.parametrize("columns", [80, 120])
def test_misspelt_and_wrong_settings_are_said_together(columns: int, tmp_path: Path) -> None:
    """Nothing of an address but host and port is printed."""
    settings = {
        "AMQP_URL": "amqp://billing:p@ss/word@broker.example:5672/",
        "WORKER_CONCURENCY": "7",
        "ONENET_RATELIMIT": "off",
        "ONENET_READ_TIMEOUT": "ten",
    }
    screen = said_to(("topology",), tmp_path, columns, **settings)
    assert not any(secret in screen for secret in ("p@ss", "word@"))
    assert_screen(f"settings-{columns}", screen)


@pytest.mark.parametrize("columns", [80, 120])
def test_what_is_declared_is_shown(deployment: Deployment, columns: int, tmp_path: Path) -> None:
    namespace = deployment.topology.namespace
    with closing(Proxy(deployment.broker_url)) as proxy:  # at 127.0.0.1, wherever the broker is
        port = str(urlsplit(proxy.url).port)
        screen = said_to(("topology",), tmp_path, columns, AMQP_URL=proxy.url, WORKER_NAMESPACE=namespace)
    assert_screen(f"topology-{columns}", screen, {port: "5" * len(port), namespace: "test-namespace"[: len(namespace)]})
