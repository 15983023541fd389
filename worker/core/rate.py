"""A rate limit as the settings write it: a count per period."""

import re
from dataclasses import dataclass
from typing import Self

_FORM = re.compile(r"([1-9][0-9]{0,6})\s*/\s*(second|minute|hour|day)", re.IGNORECASE)
_PERIODS_S = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}


@dataclass(frozen=True, slots=True)
class Rate:
    """At most ``count`` requests per ``period_s`` seconds."""

    count: int
    period_s: int

    def __str__(self) -> str:
        """Return the rate as the settings write it."""
        [unit] = [unit for unit, period_s in _PERIODS_S.items() if period_s == self.period_s]
        return f"{self.count}/{unit}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a rate such as ``200/second``.

        Raises:
            ValueError: the text is not a count and a unit.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError("must be a count and a unit, such as 200/second, 1000/minute, 5000/hour or 50000/day")
        return cls(int(found[1]), _PERIODS_S[found[2].lower()])
