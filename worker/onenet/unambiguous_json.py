"""JSON that every parser reads alike. Of a name that an object has twice, some take the first value, some the last."""

import json
from typing import Any

from pydantic_core import from_json


class RepeatedName(ValueError):
    """An object has a name twice."""


def read_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        RepeatedName: an object in it has a name twice; some parsers do not tell upper case from lower case.
        ValueError: it is no JSON, too deep, or has half a surrogate pair or a number of thousands of digits.
    """
    try:
        _check_names(text)
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    return from_json(text)  # which also refuses what Python's parser is lenient about


def repeats_names(text: str) -> bool:
    """Tell whether a text is JSON in which an object has a name twice."""
    try:
        read_json(text)
    except ValueError as exc:
        return isinstance(exc, RepeatedName)
    return False


def _check(fields: list[tuple[str, object]]) -> None:
    if len({name.casefold() for name, _ in fields}) < len(fields):
        raise RepeatedName("an object has a name twice")


# It returns no object, so that the values of the JSON are not held twice.
_check_names = json.JSONDecoder(object_pairs_hook=_check).decode
