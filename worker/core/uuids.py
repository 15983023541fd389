"""Whether two uuids are the same. Pure, and the only place that decides it.

The answer to a command and its device's history may write one uuid in two ways. So uuids are compared by value: a
standard uuid, of 32 hexadecimal digits, whatever its case, hyphens, blanks or braces. Any other text is the same only
if it is written alike; where it differs in case or blanks alone, it may be the same, and nothing proves it.
"""

import re
from dataclasses import dataclass

_STANDARD = re.compile(r"(?:urn:)?(?:uuid:)?([0-9a-f]{32})\Z")
_PUNCTUATION = re.compile(r"[\s{}()\[\]\"'-]+")


@dataclass(frozen=True, slots=True)
class Spelling:
    """One text under which the owner of a uuid may be recorded.

    ``is_certain``: who is recorded under it owns the uuid for certain; otherwise it may be another uuid.
    ``is_written``: a new owner is recorded under it; the others are spellings under which a former version may have.
    """

    text: str
    is_certain: bool
    is_written: bool


def value_of(uuid: str) -> str:
    """Return a text that is equal for equal uuids: of a standard one its usual form, of another the text itself."""
    return _standard(uuid) or uuid


def likeness_of(uuid: str) -> str:
    """Return a text that is equal for uuids that may be the same: of a standard one its usual form."""
    return _standard(uuid) or "".join(uuid.split()).casefold()


def spellings(uuid: str) -> list[Spelling]:
    """Return where the owner of a uuid may be recorded, what is certain first."""
    usual = _standard(uuid)
    if usual is None:
        alike = likeness_of(uuid)
        unsure = [Spelling(alike, is_certain=False, is_written=True)]
        unsure += [
            Spelling(text, is_certain=False, is_written=False) for text in ("".join(uuid.split()), alike.upper())
        ]
        return _each_once([Spelling(uuid, is_certain=True, is_written=True), *unsure])
    former = [
        form.format(text)
        for text in (usual, usual.upper(), usual.replace("-", ""), usual.replace("-", "").upper())
        for form in ("{}", "{{{}}}")
    ]
    written = [Spelling(text, is_certain=True, is_written=True) for text in (usual, uuid)]
    return _each_once([*written, *(Spelling(text, is_certain=True, is_written=False) for text in former)])


def _standard(uuid: str) -> str | None:
    found = _STANDARD.match(_PUNCTUATION.sub("", uuid).lower())
    if found is None:
        return None
    digits = found[1]
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _each_once(found: list[Spelling]) -> list[Spelling]:
    texts: dict[str, Spelling] = {}
    for spelling in found:
        texts.setdefault(spelling.text, spelling)
    return list(texts.values())
