"""Whether two texts name the same uuid. Pure, and the only module that decides it.

The answer to a command and the device's history may write one uuid in two ways. A standard uuid (32 hexadecimal digits)
is compared by value, whatever its case, hyphens, blanks or braces. Any other text is certainly the same uuid only if it
is identical; if it differs only in case or blanks it may be the same, and nothing proves it.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

_STANDARD = re.compile(r"(?:urn:)?(?:uuid:)?([0-9a-f]{32})\Z")
_PUNCTUATION = re.compile(r"[\s{}()\[\]\"'-]+")


@dataclass(frozen=True, slots=True)
class RecordedForm:
    """One text under which a store may have recorded the owner of a uuid.

    Attributes:
        text: the form.
        is_certain: an owner recorded under it certainly owns the uuid; otherwise it may own another uuid.
        is_written: new owners are recorded under it; the other forms may have been written by earlier versions.
    """

    text: str
    is_certain: bool
    is_written: bool


def canonical_uuid(uuid: str) -> str:
    """Return the form that equal uuids share: lower case with hyphens for a standard uuid, else the text itself."""
    return _standard(uuid) or uuid


def folded_uuid(uuid: str) -> str:
    """Return the form that uuids share if they may be equal: the canonical form, else without case and blanks."""
    return _standard(uuid) or "".join(uuid.split()).casefold()


def recorded_forms(uuid: str) -> list[RecordedForm]:
    """Return the texts under which the owner of a uuid may be recorded, the certain ones first."""
    standard = _standard(uuid)
    if standard is None:
        folded = folded_uuid(uuid)
        uncertain = [RecordedForm(folded, is_certain=False, is_written=True)]
        uncertain += [
            RecordedForm(text, is_certain=False, is_written=False) for text in ("".join(uuid.split()), folded.upper())
        ]
        return _without_duplicates([RecordedForm(uuid, is_certain=True, is_written=True), *uncertain])
    former = [
        form.format(text)
        for text in (standard, standard.upper(), standard.replace("-", ""), standard.replace("-", "").upper())
        for form in ("{}", "{{{}}}")
    ]
    written = [RecordedForm(text, is_certain=True, is_written=True) for text in (standard, uuid)]
    return _without_duplicates([*written, *(RecordedForm(text, is_certain=True, is_written=False) for text in former)])


@lru_cache(maxsize=128)  # recording an outcome asks several times for the same uuid
def _standard(uuid: str) -> str | None:
    found = _STANDARD.match(_PUNCTUATION.sub("", uuid).lower())
    if found is None:
        return None
    digits = found[1]
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def _without_duplicates(forms: list[RecordedForm]) -> list[RecordedForm]:
    by_text: dict[str, RecordedForm] = {}
    for form in forms:
        by_text.setdefault(form.text, form)
    return list(by_text.values())
