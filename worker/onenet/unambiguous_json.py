"""JSON that every parser reads alike, and whose values take little memory. All JSON of the platform is read here.

Of a name that an object has twice, some parsers take the first value, some the last. A table of a few bytes takes
hundreds of them as an object of Python.
"""

import json
import re
from itertools import islice
from typing import Any

from pydantic_core import from_json

MAX_VALUES = 10_000  # 100 for each entry of a full page, which has about ten; reading 256 KiB of them takes up to 4 MiB
# A string, in one piece so that no repetition is tried again, or what stands before each value but the outermost.
_STRING_OR_VALUE = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([{\[,])', re.DOTALL)


class RepeatedName(ValueError):
    """An object has a name twice."""


class TooManyValues(ValueError):
    """It has more values than any answer of the platform."""


def read_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        RepeatedName: an object in it has a name twice; some parsers do not tell upper case from lower case.
        TooManyValues: it has more than MAX_VALUES values. It may be no JSON, or have a name twice.
        ValueError: it is no JSON, too deep, or has half a surrogate pair or a number of thousands of digits.
    """
    if _has_too_many_values(text):
        raise TooManyValues(f"it has more than {MAX_VALUES} values")
    try:
        _check_names(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    return from_json(text)  # which also refuses what Python's parser is lenient about


def may_repeat_names(text: str) -> bool:
    """Tell whether a text is JSON in which an object has a name twice, or has too many values to tell."""
    try:
        read_json(text)
    except ValueError as exc:
        return isinstance(exc, RepeatedName | TooManyValues)
    return False


def _has_too_many_values(text: str) -> bool:
    if sum(map(text.count, "{[,")) <= MAX_VALUES:
        return False
    begins = (found for found in _STRING_OR_VALUE.finditer(text) if found[1])
    return next(islice(begins, MAX_VALUES, None), None) is not None


def _check(fields: list[tuple[str, object]]) -> None:
    if len({name.casefold() for name, _ in fields}) < len(fields):
        raise RepeatedName("an object has a name twice")


# It returns no object, so that the values of the JSON are not held twice.
_check_names = json.JSONDecoder(object_pairs_hook=_check).decode
