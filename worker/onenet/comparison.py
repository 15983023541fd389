"""Whether a value in a device's command history is the value that was sent. Pure.

The spelling of a field proves nothing: a serializer may write 3311 as 3311.0 or "3311", an empty string as null, an
emoji as ????. So values are compared. A value that differs only in its spelling, is missing, or has an unknown form is
unclear: it may be the value that was sent, and nothing proves either.
"""

import base64
import html
import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto
from functools import lru_cache
from itertools import permutations, product
from typing import Self
from urllib.parse import unquote
from zoneinfo import ZoneInfo

from schemas.onenet import whole_number
from worker.onenet.unambiguous_json import may_repeat_names


class Verdict(Enum):
    """The result of comparing one field, or all fields of an entry."""

    EQUAL = auto()
    DIFFERENT = auto()  # certainly
    UNCLEAR = auto()


EQUAL, DIFFERENT, UNCLEAR = Verdict.EQUAL, Verdict.DIFFERENT, Verdict.UNCLEAR

LWM2M_IDS = range(65536)
# The platform may have filled in a valid_time that is this close to create_time.
FILLED_IN_WITHIN = timedelta(seconds=5)

_IMEIS = (range(1_000, 10_000), range(10**14, 10**15))
_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[T ]([0-9]{2}:[0-9]{2})(:[0-9]{2}(?:[:.][0-9]{1,9})?)? ?(Z|[+-][0-9]{2}:?[0-9]{2})?\Z"
)
_EXECUTE = "EXECUTE"
_TYPES = ("READ", "WRITE", _EXECUTE)  # in the order of the platform's numbers for them
_MINUTE = timedelta(seconds=59)  # uncertainty of a time without seconds
_DAY = timedelta(hours=23, minutes=59, seconds=59)  # uncertainty of a date without a time
_HALF_MINUTE = timedelta(seconds=30)  # a time without seconds may have been rounded up
_HALF_DAY = timedelta(hours=12)  # a clock of twelve hours shows 15:00 as 03:00
_NOON = 12  # the hour
_YEARS = range(2001, 9000)  # other years mean "no value": an epoch, or the first or last day of a calendar

_MAX_SHOWN_CHARS = 16_384  # args have at most 2 KB: no known form of them is longer
_MIN_CUT_WIDTH = 16  # a shorter text that is the prefix of another is rather a command of its own
_MAX_NUMBER_CHARS = 25  # serializers do not round longer digit strings
_MAX_DECODINGS = 4
_ESCAPE = re.compile(r"\\(?:(?:U([0-9a-fA-F]{8})|[uU]([0-9a-fA-F]{4})|x([0-9a-fA-F]{2}))|(.))", re.DOTALL)
_HALF_ESCAPE = re.compile(r"(?:&#?\w{0,8}|\\(?:u[0-9a-fA-F]{0,3}|x[0-9a-fA-F]?)?|%[0-9a-fA-F]?)\Z")
_BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")
_WORD = re.compile(r"[^\W_]+")
_TOKEN = re.compile(r"(?<!\w)-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,4})?(?!\w)|[^\W_]+")
_CONSTANTS = {"true": "1.0", "false": "0.0", "null": "", "none": "", "undefined": ""}
_MAY_END_TEXT = re.compile("[\x00-\x1f\x7f\U00010000-\U0010ffff]+|[\x80-\uffff]+")  # at which a store may truncate
_NOT_ASCII = re.compile(r"[^\x00-\x7f]+")
_ELLIPSIS = re.compile(r"\.{3,}|\.\.\s*\Z|[(\[<]truncated\b")
_MASK = re.compile(r"[*\u2022\u25cf]+|[x\u00d7]{4,}", re.IGNORECASE)
_WRAPPED = re.compile(r"args ?[=:] ?(.*)\Z|<!\[CDATA\[(.*)\]\]>\Z", re.IGNORECASE | re.DOTALL)
# What is shown instead of a text that is hidden, binary or missing: one word of a list, or words in brackets.
_PLACEHOLDER = re.compile(
    r"(?:n/a|na|nil|hidden|redacted|masked|secret|encrypted|binary|omitted|unknown|protected|confidential"
    r"|(?:已|被)?(?:隐藏|脱敏|屏蔽|加密|省略)|二进制|未知|无)\Z|[\[(<{\u3010][\w ./:-]+[\])>}\u3011]\Z",
    re.IGNORECASE,
)
# A digest, or what an unknown key has encrypted.
_CIPHERTEXT = re.compile(r"(?:0x)?[0-9a-f]{16,}\Z|[0-9a-z+/_-]{10,}={1,2}\Z", re.IGNORECASE)
# The replacements that stores and decoders use for characters that they cannot represent.
_LOSS = re.compile("[?\x00-\x08\x0e-\x1f\x7f-\x9f\u00bf\u25a0\u25a1\u3013\ue000-\uf8ff\ufffc\ufffd]")
_CHARSETS = ("utf-8", "gb18030", "gbk", "gb2312", "big5", "cp1252", "latin-1", "shift_jis", "euc_kr")
_MAX_GARBLED_CHARS = 12  # per character, such as the digits of a surrogate pair's escapes without backslashes
_TAG = re.compile(r"<[^<>]*(?:>|\Z)")
_ATTRIBUTES = re.compile(r"<(/?\w+)\s[^<>]*>")
_ELEMENT = re.compile(r"<(\w+)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_SCRIPT = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.DOTALL | re.IGNORECASE)


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on an entry: one certain difference makes it another command."""
    found = set(verdicts)
    if DIFFERENT in found:
        return DIFFERENT
    return UNCLEAR if UNCLEAR in found else EQUAL


def is_absent(shown: object) -> bool:
    """Tell whether a field has no value."""
    return shown is None or (isinstance(shown, str) and not shown.strip())


def compare_number(sent: int, shown: object, allowed: range) -> Verdict:
    """Compare a number that every command has. ``allowed``: the values that the platform accepts."""
    number = whole_number(shown)
    if number == sent:
        return EQUAL
    return DIFFERENT if number is not None and number in allowed else UNCLEAR


def compare_parameter(
    sent: int | None, shown: object, allowed: range, default: int, *, may_show_rest: bool = False
) -> Verdict:
    """Compare an optional number; if it was not sent, the history has nothing or the platform's default.

    Args:
        sent: the number; None if it was not sent.
        shown: the value in the history.
        allowed: the values that the platform accepts.
        default: the platform's documented default.
        may_show_rest: the history may show what is left of it, such as the attempts still to be made.
    """
    if is_absent(shown):
        return EQUAL if sent in {None, default} else UNCLEAR
    verdict = compare_number(default if sent is None else sent, shown, allowed)
    if verdict is not DIFFERENT:
        return verdict
    if sent is None:  # the platform's default may differ from the documented one
        return UNCLEAR
    return UNCLEAR if may_show_rest and whole_number(shown) in range(sent) else DIFFERENT


def compare_imei(sent: str, shown: object) -> Verdict:
    """Compare the device. Absent is equal, because a history is read for one device."""
    if is_absent(shown):
        return EQUAL
    number = whole_number(shown)
    if number == int(sent):
        return EQUAL
    # A float may have lost digits, so it proves no difference.
    is_whole = isinstance(shown, int) or (isinstance(shown, str) and shown.strip().isdecimal())
    is_imei = number is not None and any(number in numbers for numbers in _IMEIS)
    return DIFFERENT if is_whole and is_imei else UNCLEAR


def compare_type(shown: object) -> Verdict:
    """Compare the type of command: a word in the history, a number elsewhere on the platform."""
    word = shown.strip().upper() if isinstance(shown, str) else None
    number = whole_number(shown)
    if word == _EXECUTE or number == _TYPES.index(_EXECUTE):
        return EQUAL
    return DIFFERENT if word in _TYPES or number in range(len(_TYPES)) else UNCLEAR


@dataclass(frozen=True, slots=True)
class ShownTime:
    """A time of the history, in the platform's local time without an offset.

    Attributes:
        readings: the times that it may mean: two if it has an offset, which the platform may have added to local time.
        uncertainty: how much later it may be, because it has no seconds.
        has_offset: it was written with an offset.
    """

    readings: tuple[datetime, ...]
    uncertainty: timedelta
    has_offset: bool = False

    def alternatives(self, zone: ZoneInfo) -> "list[ShownTime]":
        """Return the other times that it may mean, each with the uncertainty that its zeros suggest.

        It may be truncated or rounded, in UTC without an offset, or written with a clock of twelve hours.
        """
        found = []
        for moment in self.readings:
            uncertainty = max(self.uncertainty, _padding(moment))
            earlier = timedelta(0) if uncertainty in {timedelta(0), _DAY} else _HALF_MINUTE  # it may be rounded up
            shifts = [timedelta(0)]
            if not self.has_offset:
                shifts.append(_offset(moment, zone))
            if uncertainty < _DAY and moment.hour < _NOON:
                shifts.append(_HALF_DAY)
            begins = [(moment + shift - earlier).replace(microsecond=0) for shift in shifts]
            found += [ShownTime((begin,), uncertainty + earlier, self.has_offset) for begin in begins]
        return found


def _padding(moment: datetime) -> timedelta:
    if moment.second or moment.microsecond:
        return timedelta(0)
    return _MINUTE if moment.hour or moment.minute else _DAY


def _offset(moment: datetime, zone: ZoneInfo) -> timedelta:
    return moment.replace(tzinfo=zone).utcoffset() or timedelta(0)


def read_time(shown: object, zone: ZoneInfo) -> ShownTime | None:
    """Read a time: with a blank or a T, optionally with seconds, ``:mmm`` or ``.mmm``, and an offset.

    None: its form is unknown, there is no such time, or it means "no value".
    """
    found = _TIME.match(shown.strip()) if isinstance(shown, str) else None
    if found is None:
        return None
    day, minute, seconds, offset = found.groups()
    second, fraction = (seconds[1:3], seconds[4:10]) if seconds else ("00", "")
    try:
        local = datetime.fromisoformat(f"{day}T{minute}:{second}").replace(microsecond=int(fraction.ljust(6, "0")))
        readings = [local]
        if offset:
            readings.append(
                datetime.fromisoformat(f"{local.isoformat()}{offset}").astimezone(zone).replace(tzinfo=None)
            )
    except (ValueError, OverflowError):  # there is no such time
        return None
    if any(moment.year not in _YEARS for moment in readings):
        return None
    return ShownTime(tuple(readings), timedelta(0) if seconds else _MINUTE, has_offset=bool(offset))


def is_no_value(shown: object) -> bool:
    """Tell whether a time means "no value", such as 1970-01-01 or 0001-01-01."""
    found = _TIME.match(shown.strip()) if isinstance(shown, str) else None
    return found is not None and int(found[1][:4]) not in _YEARS


def compare_time(sent: datetime, shown: object, zone: ZoneInfo) -> Verdict:
    """Compare a time that was sent, in the platform's local time without an offset, to the second.

    A time that is truncated or rounded, in UTC without an offset, with the zone's offset added once more, or written
    with a clock of twelve hours, is unclear.
    """
    found = read_time(shown, zone)
    if found is None:
        return UNCLEAR
    if any(moment.replace(microsecond=0) <= sent <= moment + found.uncertainty for moment in found.readings):
        return UNCLEAR if found.uncertainty else EQUAL
    shown_as = [sent] if found.has_offset else [sent, sent + _offset(sent, zone)]
    if sent.hour == 0:
        shown_as.append(sent + _HALF_DAY)  # half past midnight is 12:30
    for each in found.alternatives(zone):
        if any(each.readings[0] <= moment <= each.readings[0] + each.uncertainty for moment in shown_as):
            return UNCLEAR
    return DIFFERENT


def compare_valid_time(
    sent: datetime | None, shown: object, created: ShownTime | None, zone: ZoneInfo, *, may_be_omitted: bool
) -> Verdict:
    """Compare ``valid_time``, which the platform fills in if it was not sent.

    Args:
        sent: the command's valid_time, local without an offset; None if it has none.
        shown: the value in the history.
        created: when the entry was cached; None if that cannot be read.
        zone: the zone of the platform's local time.
        may_be_omitted: it may have been in the past when the command was sent; the request then had none.
    """
    if is_absent(shown) or is_no_value(shown):
        return EQUAL if sent is None or may_be_omitted else UNCLEAR
    if sent is not None:
        verdict = compare_time(sent, shown, zone)
        if verdict is not DIFFERENT or not may_be_omitted:
            return verdict
    found = read_time(shown, zone)
    if found is None or created is None:
        return UNCLEAR
    have_same_form = len(found.readings) == len(created.readings)
    pairs = list((zip if have_same_form else product)(found.readings, created.readings))
    if any(moment.replace(microsecond=0) <= cached for moment, cached in pairs):
        # A valid_time that was sent must be later than this: the platform filled it in on arrival.
        return UNCLEAR if found.uncertainty or created.uncertainty else EQUAL
    is_later = all(moment - cached > created.uncertainty + FILLED_IN_WITHIN for moment, cached in pairs)
    return DIFFERENT if is_later else UNCLEAR


def compare_content(sent: str | None, shown: object) -> Verdict:
    """Compare the args with a body: an object, its JSON text, or the bare args; without args, ``{}`` or nothing."""
    if isinstance(shown, str):
        found = _json(shown)
        if isinstance(found, dict):
            if shown == sent or may_repeat_names(shown):
                return UNCLEAR  # either the bare args, or a body that contains other args; or a body with two of them
            shown = found
        elif found is None or is_absent(shown):
            shown = None
        elif sent is not None and sent in (shown, found):
            return EQUAL
    if shown is None or shown == {}:
        return EQUAL if sent is None else UNCLEAR
    if isinstance(shown, dict) and "args" in shown:
        return compare_args(sent, shown["args"])
    return EQUAL if _is_number_text(shown, sent) else UNCLEAR


def compare_args(sent: str | None, shown: object) -> Verdict:
    """Compare the args; a text is different if it is no known spelling of the text that was sent."""
    if shown == sent or _is_number_text(shown, sent):
        return EQUAL
    if _has_name_twice(sent, shown):
        return UNCLEAR
    if isinstance(shown, str):
        body = _json(shown)
        if isinstance(body, dict) and "args" in body and compare_args(sent, body["args"]) is not DIFFERENT:
            return UNCLEAR  # a body within the body
        if sent is not None and (wrapped := _WRAPPED.match(shown)) and sent in wrapped.groups():
            return UNCLEAR
        return _compare_text(sent or "", shown)
    wanted = None if sent is None else _json(sent)
    if not any(isinstance(wanted, kind) and isinstance(shown, kind) for kind in (dict, list, int | float)):
        return UNCLEAR  # neither text nor the JSON value of the text
    if sent is None or isinstance(shown, bool) or isinstance(wanted, bool):
        return UNCLEAR
    try:
        return _compare_text(sent, json.dumps(shown, ensure_ascii=False))
    except (RecursionError, ValueError):
        return UNCLEAR


def _has_name_twice(sent: str | None, shown: object) -> bool:
    """Tell whether one of two JSON values has a name twice: what a serializer leaves of it is not known."""
    if not isinstance(_json(shown) if isinstance(shown, str) else shown, dict | list):
        return False
    return any(isinstance(text, str) and may_repeat_names(text) for text in (sent, shown))


def _compare_text(sent: str, shown: str) -> Verdict:
    if len(shown) > _MAX_SHOWN_CHARS:
        return UNCLEAR
    try:
        is_spelling = _is_spelling(sent, shown)
    except (RecursionError, ValueError):  # nested too deeply, or an escape with thousands of digits
        return UNCLEAR
    return UNCLEAR if is_spelling else DIFFERENT


def _is_spelling(sent: str, shown: str) -> bool:
    """Tell whether a text may be another spelling of the text that was sent."""
    mine, theirs = ([_Text.of(reading) for reading in _readings(text)] for text in (sent, shown))
    if not "".join(theirs[0].tokens) or any(len(text.plain) > _MAX_SHOWN_CHARS for text in theirs):
        return True  # nothing is left to compare, or a few characters stand for more than any args have
    pairs = [*product(mine, theirs), *_sorted_objects(sent, shown), *_without_markup(mine[0], theirs[0])]
    return (
        any(
            _is_rewritten(one, other) or _is_cut(one, other) or _is_garbled(one, other) or _is_masked(one, other)
            for one, other in pairs
        )
        or _is_encoded(mine[0], theirs[0])
        or _is_hidden(sent, shown)
    )


def _readings(text: str) -> list[str]:
    """Return a text, and the text without its backslashes, which may be escapes or have been dropped."""
    return [text, text.replace("\\", "")] if "\\" in text else [text]


def _sorted_objects(sent: str, shown: str) -> list[tuple["_Text", "_Text"]]:
    """Return two JSON objects with their keys in the same order."""
    found = [_json(sent), _json(shown)]
    if not all(isinstance(value, dict) for value in found):
        return []
    one, other = (_Text.of(json.dumps(value, sort_keys=True, ensure_ascii=False)) for value in found)
    return [(one, other)]


def _without_markup(sent: "_Text", shown: "_Text") -> list[tuple["_Text", "_Text"]]:
    """Return the texts that a filter of markup may have left, paired with the text in the history."""
    text = sent.unescaped
    stripped = {_TAG.sub("", text), _ELEMENT.sub("", text), _SCRIPT.sub("", text), _ATTRIBUTES.sub(r"<\1>", text)}
    found = [shown]
    tags = iter(_TAG.findall(text.casefold()))
    if all(tag in tags for tag in _TAG.findall(shown.unescaped.casefold())):  # some of them may have been left
        found.append(_Text.of(_TAG.sub("", shown.unescaped)))
    return [(_Text.of(each), other) for each in stripped - {text} for other in found]


@dataclass(frozen=True, slots=True)
class _Text:
    """A text in the normalized forms that are compared.

    Attributes:
        text: as given.
        unescaped: without escapes.
        plain: unescaped and folded.
        tokens: its words and numbers.
        words: its letters and digits.
    """

    text: str
    unescaped: str
    plain: str
    tokens: list[str]
    words: str

    @classmethod
    def of(cls, text: str) -> Self:
        unescaped = _unescaped_text(text)
        plain = _folded(unescaped)
        return cls(text, unescaped, plain, _tokens(plain), _words(plain))


def _is_rewritten(sent: _Text, shown: _Text) -> bool:
    """Tell whether two texts differ only in blanks, case, escapes, or the spelling of JSON."""
    wanted, found = _json(sent.text), _json(shown.text)
    if not isinstance(found, dict | list):
        found = _json(html.unescape(shown.text))
    if _printed(_folded(sent.text)) == _printed(_folded(shown.text)):  # the case of an escape may differ too
        return True
    if isinstance(wanted, dict | list) and isinstance(found, dict | list):
        return _canonical(wanted) == _canonical(found)
    if "".join(sent.tokens) == "".join(shown.tokens) or _printed(sent.plain) == _printed(shown.plain):
        return True
    # An object in another format than JSON, with its keys in another order.
    return isinstance(wanted, dict) and sorted(sent.tokens) == sorted(shown.tokens)


def _is_cut(sent: _Text, shown: _Text) -> bool:
    """Tell whether a text may be the other, truncated."""
    is_whole = any(isinstance(_json(text), dict | list) for text in (shown.text, html.unescape(shown.text)))
    width = sum(1 if letter.isascii() else 2 for letter in shown.text)
    if not is_whole and width >= _MIN_CUT_WIDTH and sent.words.startswith(_beginning(shown.text)):
        return True
    folded = _folded(shown.text)
    if ellipsis := _ELLIPSIS.search(folded):
        head, tail = folded[: ellipsis.start()], folded[ellipsis.end() :]
        if sent.words.startswith(_beginning(head)) if head else _words(_folded(sent.text)).endswith(_words(tail)):
            return True
    return shown.words in _words_before_cuts(sent.text)


@lru_cache(maxsize=8)  # a text that was sent is compared with each entry of a history
def _words_before_cuts(text: str) -> frozenset[str]:
    """Return the letters and digits before each place at which a store may truncate a text."""
    return frozenset(_words(_decoded(text[: found.start()])) for found in _MAY_END_TEXT.finditer(text))


def _is_garbled(sent: _Text, shown: _Text) -> bool:
    """Tell whether a text may be the other after a wrong character set.

    Each run of characters beyond ASCII may then have been kept, lost, or replaced by anything, together with the
    characters next to it; the ASCII between the runs stays.
    """
    if sent.unescaped.isascii():
        return False
    ours, theirs = (_beyond_ascii(each.unescaped) for each in (sent, shown))
    strange = set(theirs) - set(ours)
    is_replaced = len(_LOSS.findall(shown.unescaped)) > len(_LOSS.findall(sent.unescaped))
    if not is_replaced and not strange:
        kept = iter(ours)
        if len(theirs) >= len(ours) or not all(letter in kept for letter in theirs):
            return False  # nothing is lost
    if not is_replaced and all(map(_is_common, strange)) and not strange <= _garbled(sent.unescaped):
        return False  # another, undamaged text
    taken = 1 if is_replaced or strange else 0
    parts = _NOT_ASCII.split(sent.unescaped)
    lengths = [
        max(_MAX_GARBLED_CHARS * (len(run) + 1), len(_folded(run))) for run in _NOT_ASCII.findall(sent.unescaped)
    ]
    words = [
        _words(_folded(part[(taken if number > 0 else 0) : (len(part) - taken if number < len(lengths) else None)]))
        for number, part in enumerate(parts)
    ]
    return _fits(words, lengths, shown.words)


def _beyond_ascii(text: str) -> str:
    """Return the characters beyond ASCII, without replacement characters."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    return "".join(letter for letter in plain if not letter.isascii() and not _LOSS.match(letter))


def _is_common(letter: str) -> bool:
    """Tell whether a character is common Chinese: level 1 of GB 2312 or Big5, or punctuation.

    UTF-8 that is decoded as another character set nearly always contains rarer ones.
    """
    simplified, traditional = letter.encode("gb2312", "ignore")[:1], letter.encode("big5", "ignore")[:1]
    return b"\xb0" <= simplified <= b"\xd7" or simplified == b"\xa1" or b"\xa4" <= traditional <= b"\xc6"


@lru_cache(maxsize=8)
def _garbled(text: str) -> frozenset[str]:
    """Return the characters beyond ASCII that result from encoding in one character set and decoding in another."""
    found: set[str] = set()
    for written, read in permutations(_CHARSETS, 2):
        found.update(_beyond_ascii(text.encode(written, "ignore").decode(read, "ignore")))
    return frozenset(found)


def _is_masked(sent: _Text, shown: _Text) -> bool:
    """Tell whether a text may be the other with a part masked by asterisks."""
    parts = _MASK.split(shown.unescaped)
    if len(parts) <= len(_MASK.split(sent.unescaped)):
        return False
    return _fits([_words(_folded(part)) for part in parts], [len(sent.words)] * (len(parts) - 1), sent.words)


def _fits(words: list[str], lengths: list[int], text: str) -> bool:
    """Tell whether a text consists of these words in order, with at most the given lengths between them."""
    reached = 1  # one bit for each position at which the words so far may end
    known: dict[str, int] = {}
    for word, length in zip(words, [0, *lengths], strict=True):
        width = 1
        while width <= min(length, len(text)):
            step = min(width, length + 1 - width)
            reached |= reached << step
            width += step
        if word not in known:
            known[word] = _places(word, text)
        reached = (reached & known[word]) << len(word)
        if not reached:
            return False
    return bool(reached >> len(text) & 1)


def _places(word: str, text: str) -> int:
    """Return one bit for each position at which a word occurs in a text."""
    bits = bytearray(len(text) // 8 + 1)
    at = text.find(word)
    while at >= 0:
        bits[at // 8] |= 1 << at % 8
        at = text.find(word, at + 1)
    return int.from_bytes(bits, "little")


def _is_encoded(sent: _Text, shown: _Text) -> bool:
    """Tell whether a text is the other in base64, in hexadecimal digits, or as a list of its bytes."""
    data = sent.text.encode("utf-8", "replace")
    signed = memoryview(data).cast("b")  # as Java shows them
    lists = ([f"{byte}" for byte in data], [f"{byte}" for byte in signed], [f"0x{byte:02x}" for byte in data])
    encoded = {_words(writing.casefold()) for writing in (base64.b64encode(data).decode(), data.hex())}
    encoded |= {_words("".join(numbers)) for numbers in lists}
    return bool(data) and _words(shown.text.casefold()) in encoded


def _is_hidden(sent: str, shown: str) -> bool:
    """Tell whether a text may stand for one that is not shown, of another form than the text that was sent."""
    one, other = (unicodedata.normalize("NFKC", text).strip() for text in (sent, shown))
    has_value = isinstance(_json(other), dict | list)
    return not has_value and any(form.match(other) and not form.match(one) for form in (_PLACEHOLDER, _CIPHERTEXT))


def _json(text: str) -> object:
    """Return the value of a JSON text, or the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _is_number_text(shown: object, sent: str | None) -> bool:
    """Tell whether a value is the whole number whose text was sent."""
    is_number = isinstance(shown, int) and not isinstance(shown, bool)
    return is_number and sent is not None and whole_number(sent) == shown and sent == str(shown)


def _decoded(text: str) -> str:
    """Return a text without escapes, folded."""
    return _folded(_unescaped_text(text))


def _unescaped_text(text: str) -> str:
    """Return a text without the escapes of HTML, JSON and URLs, nested ones included."""
    for _ in range(_MAX_DECODINGS):
        plain = unquote(_ESCAPE.sub(_unescaped, html.unescape(text)))
        if plain == text:
            break
        text = plain
    return text


def _folded(text: str) -> str:
    """Return a text without case, width and accents, and without characters that not every store keeps."""
    # MySQL's utf8, for example, has no characters beyond the Basic Multilingual Plane.
    return unicodedata.normalize("NFKD", _BEYOND_BMP.sub("", text)).casefold()


def _unescaped(found: re.Match[str]) -> str:
    if digits := found[1] or found[2] or found[3]:
        code = int(digits, 16)
        return chr(code) if code <= sys.maxunicode else ""
    return " " if found[4] in "nrtbf0" else found[4]


def _beginning(text: str) -> str:
    """Return the letters and digits of a text that may be truncated within an escape."""
    return _words(_decoded(_HALF_ESCAPE.sub("", text)))


def _words(plain: str) -> str:
    """Return only the letters and digits."""
    return "".join(_WORD.findall(plain))


def _printed(plain: str) -> str:
    """Return only the printable characters, without blanks."""
    return "".join(character for character in plain if character.isprintable() and not character.isspace())


def _tokens(plain: str) -> list[str]:
    """Return the words and numbers, each in its normalized form."""
    return [_token(token) for token in _TOKEN.findall(plain)]


def _token(token: str) -> str:
    if token.isdecimal() and len(token) > _MAX_NUMBER_CHARS:
        return token.lstrip("0")
    if token[-1].isdecimal() and (token[0] == "-" or token[0].isdecimal()):
        try:
            return repr(float(token) + 0.0)  # -0 becomes 0
        except ValueError:
            pass  # a mix of digits and letters
    return _CONSTANTS.get(token, token)


def _canonical(value: object) -> str:
    """Return a form of a JSON value that is independent of blanks, the order of keys, and empty values."""
    if isinstance(value, dict):
        pairs = ((_canonical(name), _canonical(item)) for name, item in value.items())
        return "".join(sorted(f"{name}{item}" for name, item in pairs if item))
    if isinstance(value, list):
        return "".join(map(_canonical, value))
    return "".join(_tokens(_decoded(value) if isinstance(value, str) else json.dumps(value).casefold()))
