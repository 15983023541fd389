"""Finds names that look like settings and are none: a misspelt setting would leave its default in force, silently."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

ENVIRONMENT, ENV_FILE = "the environment", ".env"
_OURS = re.compile(r"(?:AMQP|ONENET|WORKER|IDEMPOTENCY|HTTP|CONSOLE)_.+")
_LEAST_LIKENESS = 0.75  # with less, every unknown name of a prefix gets a suggestion, such as another setting of it
# Kubernetes puts variables into every container for each service of its namespace: for one that is called "worker"
# WORKER_SERVICE_HOST, WORKER_SERVICE_PORT_HTTP, WORKER_PORT=tcp://…, WORKER_PORT_9108_TCP_ADDR and others. Docker does
# the same for a link. Nobody has written them, so nobody can have misspelt them.
# Source: https://kubernetes.io/docs/tutorials/services/connect-applications-service/#environment-variables
_OF_A_SERVICE = re.compile(
    r".+_(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_ADDRESS_OF_A_SERVICE = re.compile(r"(?:tcp|udp|sctp)://.+")  # the value of NAME_PORT
# The proxy is read by the HTTP library. Some programs have variables of their own beside it, which are set together
# with it, such as HTTP_PROXY_REQUEST_FULLURI.
_PROXY = "HTTP_PROXY"
_OF_COMPOSE = {"AMQP_PORT", "WORKER_IMAGE"}  # docker/compose.yaml reads them, and a .env beside it may set them


@dataclass(frozen=True, slots=True)
class UnknownSetting:
    """A name that is set and has no effect.

    Attributes:
        name: as it is written.
        place: where it is set.
        suggestion: the setting that may be meant; None: none is like it.
    """

    name: str
    place: str
    suggestion: str | None

    def __str__(self) -> str:
        """Say it in one line, without the value, which may be a secret."""
        advice = (
            "docs/configuration.md lists the settings"
            if self.suggestion is None
            else f"did you mean {self.suggestion}?"
        )
        return f"{self.name}: is not a setting, and has no effect ({self.place}): {advice}"


def unknown_settings(
    environment: Mapping[str, str], env_file: Mapping[str, str | None], known: Collection[str]
) -> list[UnknownSetting]:
    """Return the names that begin as settings do and are none, in any case of letters, in alphabetical order.

    Args:
        environment: its variables.
        env_file: the variables of ``.env``.
        known: the names that have an effect, in upper case.
    """
    services = {name for name, value in environment.items() if _is_of_a_service(name, value)}
    found = [*_unknown(environment, ENVIRONMENT, {*known, *services}), *_unknown(env_file, ENV_FILE, known)]
    return sorted(found, key=lambda each: each.name.upper())


def _unknown(variables: Mapping[str, str | None], place: str, known: Collection[str]) -> Iterator[UnknownSetting]:
    for name, value in variables.items():
        upper = name.upper()
        is_ours = upper not in known and upper not in _OF_COMPOSE and not f"{upper}_".startswith(f"{_PROXY}_")
        if value and is_ours and _OURS.fullmatch(upper):  # an empty variable counts as not set
            likely = get_close_matches(upper, sorted([*known, _PROXY]), n=1, cutoff=_LEAST_LIKENESS)
            yield UnknownSetting(name, place, likely[0] if likely else None)


def _is_of_a_service(name: str, value: str) -> bool:
    return bool(_OF_A_SERVICE.fullmatch(name) or (name.endswith("_PORT") and _ADDRESS_OF_A_SERVICE.fullmatch(value)))
