"""Every error of validation that our models can raise has words of our own."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUseDefault

from worker.core.credentials import AccessKey, ApiKey, UserKey
from worker.core.json_faults import json_fault
from worker.core.validation import MESSAGES, messages
from worker.products_file import _Place
from worker.settings import Settings
from worker.simulator.faults import Fault

MODELS: list[type[BaseModel]] = [Settings, ApiKey, AccessKey, UserKey, _Place, Fault]
WRONG: list[Any] = [
    None, "", "x", "-1", "0", "1.5", "nan", "inf", "1e400", "9" * 5000, "1" * 30, "a b", "\ud800", "x" * 70_000, "true",
    0, -1, 1.5, float("nan"), float("inf"), 10**400, True, b"x", [], [[]], ["x"], ["9" * 5000], {}, {"x": 1}, object(),
    list(range(100)),
]  # fmt: skip


VALUE = "is not JSON: a value is expected: text in double quotes, a number, an object or a list"


def types_of(model: type[BaseModel], fields: Any) -> set[str]:
    """Return the types of the errors of a model with these fields, and check their messages."""
    try:
        model.model_validate(fields)
    except ValidationError as exc:
        said = messages(exc)
        library = {item["msg"] for item in exc.errors(include_input=False) if item["type"] != "value_error"}
        assert not library & set(said.values())
        assert all(message and "\n" not in message.strip("\n") for message in said.values())
        return {item["type"] for item in exc.errors(include_input=False)}
    except (TypeError, AttributeError, PydanticUseDefault):
        return set()  # of a validator that gets only text from the settings
    return set()


@pytest.mark.parametrize("model", MODELS)
def test_every_error_of_a_model_has_words_of_our_own(model: type[BaseModel]) -> None:
    found = types_of(model, {"no_such_field": 1}) | types_of(model, None) | types_of(model, {})
    for name in model.model_fields:
        for value in WRONG:
            found |= types_of(model, {name: value})
    assert found
    assert found - {"value_error"} <= MESSAGES.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{a: 1}", 'line 1, column 2: is not JSON: a name in double quotes, or }, is expected: "name": …'),
        ('{"a":\n 1\n "b": 2}', "line 3, column 2: is not JSON: a comma or a closing bracket is missing"),
        ('{"a" 1}', "line 1, column 6: is not JSON: a colon is missing between a name and its value"),
        ('{"a": aSecret}', f"line 1, column 7: {VALUE}"),
        ('{"a": "aSecret', "line 1, column 7: is not JSON: the text that begins here does not end"),
        ('{"a": "\\q"}', "line 1, column 8: is not JSON: a backslash that begins nothing: write \\\\"),
        ("{} {}", "line 1, column 4: is not JSON: something follows after the end"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_json_is_said_with_its_place(text: str, words: str) -> None:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    assert json_fault(caught.value) == words
