"""What a validation error says, in words of our own, and without values that may be secrets."""

import re
from types import MappingProxyType

from pydantic import ValidationError

_TOO_MANY_DIGITS = "has too many digits"
MESSAGES = MappingProxyType(
    {
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "dict_type": "must be a JSON object",
        "extra_forbidden": "is unknown here",
        "finite_number": "must be a finite number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "int_from_float": "must be a whole number",
        "int_parsing": "must be a whole number",
        "int_parsing_size": _TOO_MANY_DIGITS,
        "int_type": "must be a whole number",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "list_type": "must be a list",
        "literal_error": "must be {expected}",
        "missing": "is missing",
        "model_type": "must be a JSON object",
        "path_type": "must be the path of a file",
        "string_pattern_mismatch": "must match {pattern}",
        "string_too_long": "must have at most {max_length} characters",
        "string_too_short": "must not be empty",
        "string_type": "must be a string",
        "string_unicode": "must be text without halves of surrogate pairs",
        "too_long": "must have at most {max_length} entries",
        "too_short": "must not be empty",
        "tuple_type": "must be a list",
    }
)
"""Messages by type of error; the rules in their context hold nothing of the value."""
_OURS = "value_error"  # its text is that of a validator of this project
_OF_PLAIN_VALUES = frozenset(
    {
        "bool_parsing",
        "finite_number",
        "float_parsing",
        "greater_than",
        "greater_than_equal",
        "int_from_float",
        "int_parsing",
        "int_parsing_size",
        "less_than",
        "less_than_equal",
        "literal_error",
    }
)
_OF_CHARACTERS = re.compile(r"must match \^\[([^\]\[\\]+)\]\{([0-9]+),([0-9]+)\}\$")
_MAX_SHOWN = 40  # characters of a value


def messages(error: ValidationError) -> dict[str, str]:
    """Return what is wrong with each field, by its name; under an empty name what is wrong with several together."""
    found: dict[str, str] = {}
    for item in error.errors(include_input=False, include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == _OURS:
            text = item["msg"].removeprefix("Value error, ")
        else:
            text = MESSAGES.get(item["type"], "cannot be used").format_map(item.get("ctx", {}))
            text = _OF_CHARACTERS.sub(r"must be \2 to \3 characters of \1", text)
        found.setdefault(name, text)  # a list may be wrong at several places
    return found


def plain_values(error: ValidationError) -> dict[str, str]:
    """Return what was given for each field that must be a number or one of a few words, and is therefore no secret."""
    found: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if item["type"] in _OF_PLAIN_VALUES and item["loc"]:
            found.setdefault(str(item["loc"][0]), shown(item["input"]))
    return found


def shown(value: object) -> str:
    """Return a value in quotes, the beginning of a long one."""
    text = str(value)
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…")
