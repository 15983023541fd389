"""What is wrong with a text that is not JSON, in words of our own and with its place."""

from collections.abc import Mapping
from json import JSONDecodeError
from types import MappingProxyType

# By the beginning of the text that Python's parser gives.
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "Expecting property name": 'a name in double quotes, or }, is expected: "name": …',
        "Expecting value": "a value is expected: text in double quotes, a number, an object or a list",
        "Expecting ':'": "a colon is missing between a name and its value",
        "Expecting ','": "a comma or a closing bracket is missing",
        "Unterminated string": "the text that begins here does not end",
        "Invalid control character": "a line break or control character in a text: write \\n",
        "Invalid \\": "a backslash that begins nothing: write \\\\",
        "Illegal trailing comma": "a comma is too much before a closing bracket",
        "Extra data": "something follows after the end",
        "Unexpected UTF-8 BOM": "it begins with a byte order mark",
    }
)


def json_words(error: JSONDecodeError) -> str:
    """Return what is wrong where a text stops being JSON; it quotes nothing of the text."""
    return next((words for beginning, words in _WORDS.items() if error.msg.startswith(beginning)), "it cannot be read")


def json_fault(error: JSONDecodeError) -> str:
    """Return where a text stops being JSON, and what is wrong there; it quotes nothing of the text."""
    return f"line {error.lineno}, column {error.colno}: is not JSON: {json_words(error)}"
