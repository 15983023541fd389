"""Inputs near valid ones: JSON of any form, and bytes that were changed in a few places."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

# What parsers disagree about.
ODD_JSON = (
    "null", "true", "false", "0", "-0", "1.0", "1e0", "1E400", "-1", "65536", "9007199254740993", "1" * 400, "NaN",
    "-Infinity", '""', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"\u202e"', '"\ufeff"', "[]", "{}", "[[[[]]]]",
    '{"a":1,"a":2}', '"' + "x" * 3_000 + '"', "[" * 900 + "]" * 900, '{"a":' * 300 + "1" + "}" * 300, "'x'", "01", "+1",
)  # fmt: skip


def json_texts(leaves: SearchStrategy[str] | None = None, names: Sequence[str] = ()) -> SearchStrategy[str]:
    """Return texts that look like JSON, most of which are: names may stand in an object twice.

    Args:
        leaves: further texts of values.
        names: likely names of fields.
    """
    simple = (
        st.sampled_from(ODD_JSON)
        | st.text(max_size=8).map(json.dumps)
        | st.integers().map(str)
        | st.floats().map(json.dumps)
    )
    name = st.text(max_size=4)
    return st.recursive(
        simple if leaves is None else simple | leaves,
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
            | st.lists(st.tuples(st.sampled_from(names) | name if names else name, inner), max_size=4).map(object_text)
        ),
        max_leaves=6,
    )


def object_text(fields: Sequence[tuple[str, str]]) -> str:
    """Return the JSON text of an object whose values are texts."""
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in fields) + "}"


def encoded(text: str) -> bytes:
    """Encode a text, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")


@st.composite
def mutated(draw: DrawFn, bases: SearchStrategy[bytes], pieces: Sequence[bytes], most: int = 3) -> bytes:
    """Return inputs with up to ``most`` changes, each of which removes a few bytes and inserts a piece or any bytes."""
    data = draw(bases)
    inserted = st.sampled_from(pieces) | st.binary(max_size=4)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(inserted) + data[at + draw(st.integers(0, 3)) :]
    return data


def parsed(data: bytes) -> Any:
    """Return the value of an input that is JSON, None for any other."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None
