"""A valid command, and what identifies its content."""

import hashlib
import struct
import zlib
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

MAX_PRODUCT_CHARS = 100  # of a configured product's name, which is a label of metrics
# In the order of their digests, which is part of every record.
CONTENT_FIELDS = (
    "imei", "obj_id", "obj_inst_id", "res_id", "expired_time", "valid_time", "retry", "timeout", "trigger_msg", "args",
    "product",
)  # fmt: skip
_DIGESTS = struct.Struct(f">{len(CONTENT_FIELDS)}H")
FIELD_DIGESTS_BYTES = _DIGESTS.size
PLATFORM_DEFAULTS = {"retry": 3, "timeout": 25, "trigger_msg": 7}  # used by the platform for absent parameters


@dataclass(frozen=True, slots=True)
class Command:
    """A valid command. Times are aware; ``trigger_msg`` is the sum of its bits; None means "not given".

    ``app_id``: the upstream system that sent it, whose ids are its own; empty where the message names none.
    """

    command_id: str
    imei: str
    obj_id: int
    obj_inst_id: int
    res_id: int
    expires_at: datetime
    valid_at: datetime | None
    retry: int | None
    timeout: int | None
    trigger_msg: int | None
    args: str | None
    product: str | None
    app_id: str = ""

    @property
    def scoped_id(self) -> str:
        """The id with its upstream system, which no command of another system has."""
        return scoped_id(self.command_id, self.app_id)

    def content_hash(self) -> bytes:
        """Return 16 bytes that are the same for the same content, however its JSON was written."""
        given = (self.retry, self.timeout, self.trigger_msg, self.product)
        return _hash(self._target(), given, self.valid_at and self.valid_at.timestamp())

    def field_digests(self) -> bytes:
        """Return two bytes of each field of the content, which tell the fields in which two commands of one id differ.

        They are no proof: ``content_hash`` is.
        """
        key = zlib.crc32(self.scoped_id.encode("utf-8", "surrogatepass"))
        valid_at = None if self.valid_at is None else self.valid_at.timestamp()
        values = (
            self.imei, self.obj_id, self.obj_inst_id, self.res_id, self.expires_at.timestamp(), valid_at, self.retry,
            self.timeout, self.trigger_msg, self.args, self.product,
        )  # fmt: skip
        crc32 = zlib.crc32
        return _DIGESTS.pack(*(0 if each is None else crc32(str(each).encode(), key) & 0xFFFF for each in values))

    def match_key(self) -> bytes:
        """Return 16 bytes that are the same for whatever the platform's history may not tell apart.

        Without ``valid_time``, since one that has passed is left out, and with the defaults of what is not given.
        """
        return _hash(self._target(), self.effective("retry"), self.effective("timeout"), self.effective("trigger_msg"))

    def effective(self, name: Literal["retry", "timeout", "trigger_msg"]) -> int:
        """Return an optional parameter as the platform takes it."""
        given: int | None = getattr(self, name)
        return PLATFORM_DEFAULTS[name] if given is None else given

    def _target(self) -> tuple[object, ...]:
        numbers = self.obj_id, self.obj_inst_id, self.res_id
        return self.imei, *numbers, self.expires_at.timestamp(), self.args


def differing_fields(recorded: bytes, given: bytes) -> tuple[str, ...]:
    """Return the names of the fields whose digests differ; none if one of the two has no digests."""
    if len(recorded) != FIELD_DIGESTS_BYTES or len(given) != FIELD_DIGESTS_BYTES:
        return ()
    pairs = zip(CONTENT_FIELDS, _DIGESTS.unpack(recorded), _DIGESTS.unpack(given), strict=True)
    return tuple(name for name, one, other in pairs if one != other)


def product_name(given: str | None) -> str | None:
    """Return a product's name, or a digest of one too long to be configured, which may be as long as a body.

    The digest is too long as well.
    """
    if given is None or len(given) <= MAX_PRODUCT_CHARS:
        return given
    return hashlib.blake2b(given.encode()).hexdigest()  # 128 characters


def scoped_id(command_id: str, app_id: str) -> str:
    """Return a command id with its upstream system; no command id contains the slash."""
    return f"{command_id}/{app_id}" if app_id else command_id


def _hash(*content: object) -> bytes:
    return hashlib.blake2b(repr(content).encode(), digest_size=16).digest()
