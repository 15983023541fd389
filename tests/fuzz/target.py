"""What a fuzz target is, and how one runs: its corpus first, then new inputs until its time is up."""

import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

CORPUS = Path(__file__).with_name("corpus")
_INPUTS_PER_ROUND = 1_000  # Hypothesis keeps what it has tried until the end of a round

Check = Callable[[bytes], None]


@dataclass(frozen=True)
class Servers:
    """The servers that targets may use, started when they are first asked for; each function returns a URL."""

    rabbitmq: Callable[[], str]
    redis: Callable[[], str]


@dataclass(frozen=True)
class Target:
    """One kind of input, and what must hold for every one.

    Attributes:
        name: of the target, and of its folder in the corpus.
        inputs: generates inputs.
        open: yields the check of one input, which raises whatever the code under test raises, or AssertionError.
        neighbours: how many inputs that differ from a generated one in a few bytes are checked too. They cost less time
            than generated ones.
    """

    name: str
    inputs: SearchStrategy[bytes] = field(repr=False)  # its text is very long
    open: Callable[[Servers], AbstractContextManager[Check]]
    neighbours: int = 0

    @property
    def corpus(self) -> list[Path]:
        """The inputs that failed before, or nearly did."""
        return sorted((CORPUS / self.name).iterdir())


@dataclass(frozen=True)
class Failure:
    """The smallest input found for which a target fails. ``file``: where it is kept."""

    error: BaseException
    file: Path


class _TimeIsUp(BaseException):
    """Ends a round early; not an Exception, which would be a finding."""


class _NeighbourFailed(BaseException):
    """Ends a round: Hypothesis cannot make an input smaller that it has not generated."""


def run_corpus(target: Target, check: Check) -> Iterator[Failure]:
    """Check each input of a target's corpus; yields those that fail."""
    for file in target.corpus:
        if (error := error_of(check, file.read_bytes())) is not None:
            yield Failure(error, file)


def error_of(check: Check, data: bytes) -> Exception | None:
    """Check one input; returns its error, of whatever kind: each is a finding."""
    try:
        check(data)
    except Exception as exc:  # noqa: BLE001 - each error is a finding
        return exc
    return None


def fuzz(target: Target, check: Check, seconds: float, seed_of_run: int) -> tuple[int, Failure | None]:
    """Check new inputs until the time is up or one fails; returns how many were checked, and the failure.

    The time ends a run and decides nothing: an input that failed is made smaller however long that takes.
    """
    deadline = time.monotonic() + seconds
    seeds = random.Random(seed_of_run)
    inputs = 0
    failed: list[bytes] = []

    def check_one(data: bytes) -> None:
        nonlocal inputs
        inputs += 1
        try:
            check(data)
        except Exception:  # each error is a finding
            failed.append(data)
            raise

    def check_with_neighbours(data: bytes) -> None:
        if not failed and time.monotonic() >= deadline:
            raise _TimeIsUp
        check_one(data)
        for neighbour in () if failed else _neighbours(data, target.neighbours):
            try:
                check_one(neighbour)
            except Exception as exc:  # each error is a finding
                raise _NeighbourFailed from exc

    while time.monotonic() < deadline:
        try:
            _round(target.inputs, check_with_neighbours, seeds.getrandbits(64))
        except _TimeIsUp:
            break
        except _NeighbourFailed:
            smallest, error = _smallest(check, failed[-1])
            return inputs, Failure(error, _kept(target, smallest))
        except Exception as exc:  # each error is a finding
            if not failed:  # the error is in the generator
                raise
            # Hypothesis has tried the smallest input last, and raises its error.
            return inputs, Failure(exc, _kept(target, failed[-1]))
    return inputs, None


def _neighbours(data: bytes, number: int) -> Iterator[bytes]:
    """Yield inputs that differ in up to three places; always the same ones."""
    choices = random.Random(data)
    for _ in range(number):
        changed = data
        for _ in range(choices.randint(1, 3)):
            at, length = choices.randint(0, len(changed)), choices.choice((0, 1, 1, 2, 8))
            start = choices.randint(0, len(data))
            inserted = choices.choice((b"", choices.randbytes(1), data[start : start + choices.choice((1, 4, 40))]))
            changed = changed[:at] + inserted + changed[at + length :]
        yield changed


def _smallest(check: Check, data: bytes) -> tuple[bytes, Exception]:
    """Remove from an input that fails whatever is not needed for it to fail; returns the rest and its error."""
    error: Exception = AssertionError("it failed only once")
    length = len(data)
    while length:
        at = 0
        while at < len(data):
            fewer = data[:at] + data[at + length :]
            if (found := error_of(check, fewer)) is None:
                at += length
            else:
                data, error = fewer, found
        length //= 2
    return data, error_of(check, data) or error


def _round(inputs: SearchStrategy[bytes], check: Check, number: int) -> None:
    limits = settings(
        max_examples=_INPUTS_PER_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(limits(given(inputs)(check)))()


def _kept(target: Target, data: bytes) -> Path:
    file = CORPUS / target.name / f"found-{hashlib.sha256(data).hexdigest()[:12]}"
    file.write_bytes(data)
    return file
