"""What differs between the generations of the platform. Each has a module with its own ``Dialect``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.onenet import has_uuid, usable_uuid
from worker.core.credentials import Generation
from worker.onenet.errno import Kind, kind_of


@dataclass(frozen=True, slots=True)
class Dialect:
    """One generation of the platform.

    Attributes:
        generation: its name, as ``ONENET_API`` has it.
        path_prefix: the beginning of every path.
        code_name: the field of an answer that has the error number; 0 is success.
        text_name: the field of an answer that has the error text.
        signing_version: the version of signed tokens.
        mark: a field that tells its answers from the similar JSON of a gateway.
        own_codes: numbers that tell them too.
        kinds: the kinds of its error numbers, for errors with an unknown text.
    """

    generation: Generation
    path_prefix: str
    code_name: str
    text_name: str
    signing_version: str
    mark: str
    own_codes: range
    kinds: Mapping[int, Kind]

    def kind_of(self, code: int, text: str) -> Kind:
        """Return the kind of an error; ``code`` is not 0."""
        return kind_of(code, text, self.kinds)

    def error(self, code: int, text: str) -> str:
        """Return an error as text for people."""
        return f"{self.code_name} {code}: {text}"


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every answer of the platform has.

    Attributes:
        dialect: the generation of the platform that answers like this.
        code: the error number; 0 is success.
        text: the error text; empty if there is none.
        data: the content, not yet checked.
        others: the further members, of which none is documented.
    """

    dialect: Dialect
    code: int
    text: str
    data: Any
    others: Mapping[str, Any]

    @property
    def uuid(self) -> str:
        """The uuid of a cached command; empty if there is none, or none that is usable."""
        return usable_uuid(self.data.get("uuid")) if isinstance(self.data, dict) else ""

    @property
    def has_uuid(self) -> bool:
        """Whether there is a uuid anywhere, in whichever form."""
        # Elsewhere than in the content, a bare one is the id of the request.
        return has_uuid(self.data, or_bare=True) or has_uuid(self.text) or has_uuid(self.others)

    @property
    def kind(self) -> Kind:
        """The kind of the error; the code is not 0."""
        return self.dialect.kind_of(self.code, self.text)
