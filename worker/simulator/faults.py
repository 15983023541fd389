"""Fault injection: which faults affect a request, how often, and for which devices."""

import random
import threading
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from worker.simulator.writings import Writing

Failure = Literal[
    "refuse",
    "hang",
    "drop",
    "drop_after_caching",
    "error_500",
    "error_500_after_caching",
    "error_503",
    "too_many_requests",
    "too_many_requests_date",
    "errno",
    "errno_after_caching",
    "errno_in_chinese",
    "garbage",
    "garbage_after_caching",
    "no_uuid",
    "redirect",
    "not_found",
    "slow_drip",
    "late_caching",
]
Kind = Literal[Failure, Writing]
Endpoint = Literal["execute", "history"]


class Fault(BaseModel):
    """One kind of fault, and the requests that it affects. The ways of writing a history affect only the history."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    probability: float = Field(1.0, ge=0, le=1, description="Probability for each request that it can affect.")
    count: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Maximum number of requests; default: no limit."
    )
    imei: str | None = Field(None, description="Affects only this device.")
    endpoint: Endpoint = Field("execute", description="Affected endpoint; history includes details and logs.")
    seconds: float = Field(
        1.0, ge=0, description="Duration of refuse, hang, slow_drip and late_caching; Retry-After of 429."
    )
    errno: int = Field(7, description="The errno of errno, errno_after_caching and errno_in_chinese.")
    error: str = "service internal error"

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: object) -> object:
        """Read ``kind``, ``kind=probability`` or ``kind=probability,seconds``, and let writings affect the history."""
        if isinstance(value, str):
            kind, _, rest = value.partition("=")
            probability, _, seconds = rest.partition(",")
            value = (
                {"kind": kind}
                | ({"probability": probability} if probability else {})
                | ({"seconds": seconds} if seconds else {})
            )
        if isinstance(value, dict) and value.get("kind") in get_args(Writing):
            value = value | {"endpoint": "history"}
        return value

    @property
    def writing(self) -> Writing | None:
        """The way of writing a history, if the fault is one."""
        return next((writing for writing in get_args(Writing) if writing == self.kind), None)


class FaultPlan:
    """The active faults. Thread-safe: they may be replaced while requests are answered.

    Args:
        faults: the initial faults.
        seed: seed of the random draws, to repeat a run.
    """

    def __init__(self, faults: list[Fault], seed: int | None = None) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a seed must repeat a run, and nothing secret is drawn
        self._lock = threading.Lock()
        self.replace(faults)

    def replace(self, faults: list[Fault]) -> None:
        """Replace all faults."""
        with self._lock:
            self._left: list[tuple[Fault, int | None]] = [(fault, fault.count) for fault in faults]

    def current(self) -> list[Fault]:
        """Return the faults that have not reached their count."""
        with self._lock:
            return [fault for fault, left in self._left if left is None or left > 0]

    def draw(self, imei: str | None, endpoint: Endpoint = "execute") -> Fault | None:
        """Return the fault for this request, or None. Faults are tried in their order; the first one drawn is used."""
        with self._lock:
            for index, (fault, left) in enumerate(self._left):
                if left == 0 or fault.imei not in {None, imei} or fault.endpoint != endpoint:
                    continue
                if self._random.random() < fault.probability:
                    self._left[index] = (fault, None if left is None else left - 1)
                    return fault
        return None
