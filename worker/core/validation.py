"""What a validation error says, without the values: they may be secrets."""

from pydantic import ValidationError

_PLAIN = {
    "bool_parsing": "must be true or false",
    "extra_forbidden": "is unknown here",
    "float_parsing": "must be a number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "has too many digits",
    "literal_error": "must be {expected}",
    "missing": "is missing",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_short": "must not be empty",
}
"""Messages by type of error; the rules in their context hold nothing of the value."""


def messages(error: ValidationError) -> dict[str, str]:
    """Return what is wrong with each field, by its name; under an empty name what is wrong with several together."""
    found: dict[str, str] = {}
    for item in error.errors(include_input=False, include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        text = _PLAIN[item["type"]].format_map(item.get("ctx", {})) if item["type"] in _PLAIN else item["msg"]
        found.setdefault(name, text.removeprefix("Value error, "))  # a list may be wrong at several places
    return found
