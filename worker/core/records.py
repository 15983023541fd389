"""What a person can read of a command's record, and how the fields of one are judged. Pure.

The scripts of the store judge in the same way: a record that cannot be read proves nothing, so its command is in doubt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from schemas.reply import Reply
from schemas.result import Result
from worker.core.doubt_window import DoubtWindow

RecordState = Literal["in_progress", "in_doubt", "not_sent", "finished", "unreadable"]
RECORD_FIELDS = ("digest", "state", "token", "app", "claimed", "lease", "since", "until", "crashed")
_HASH = re.compile(r"[0-9a-f]{32}\Z")
_TOKEN = re.compile(r"[0-9]{1,16}\Z")
_MS = re.compile(r"[0-9]{1,15}\Z")
_LARGEST_TOKEN = 9_000_000_000_000_000
_LATEST = timedelta(days=1)  # no lease is as long, and no two clocks are as far from each other


@dataclass(frozen=True, slots=True)
class CommandRecord:
    """The record of one command.

    Attributes:
        command_id: the command.
        source: the upstream system that sent it; empty: it named none; None: the record does not say.
        state: ``in_progress``: a worker holds its lease. ``in_doubt``: it may have been sent. ``not_sent``: it is known
            not to have been sent yet. ``finished``: it has an outcome. ``unreadable``: another version, or a person,
            wrote what is there.
        since: of a command in progress, when it was claimed; of one in doubt, the earliest time at which it may have
            been sent; None: unknown.
        until: of a command in doubt, the latest such time.
        was_abandoned: the worker that held its lease ended without releasing it.
        reply: of a finished command.
        result: what became of an accepted command at its device, if that is recorded.
        kept_until: when the record is deleted, unless it is written again; None: unknown.
    """

    command_id: str
    source: str | None
    state: RecordState
    since: datetime | None = None
    until: datetime | None = None
    was_abandoned: bool = False
    reply: Reply | None = None
    result: Result | None = None
    kept_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class UuidOwner:
    """The command to which a uuid of the platform belongs.

    Attributes:
        command_id: the command.
        source: the upstream system that sent it; None: the record does not say.
        is_certain: False: another command that looks alike could equally own it.
    """

    command_id: str
    source: str | None
    is_certain: bool


def judge_record(
    command_id: str, fields: Mapping[str, str | None], reply: Reply | None, now: datetime
) -> CommandRecord:
    """Return what the fields of a record say.

    Args:
        command_id: the command.
        fields: those of ``RECORD_FIELDS``; None where it is absent.
        reply: the recorded reply; None: there is none that can be read.
        now: the time on the clock of the store, aware, by which leases end.
    """
    record = CommandRecord(command_id, fields["app"], "unreadable")
    content_hash, token = fields["digest"] or "", fields["token"] or ""
    if not _HASH.match(content_hash) or not _TOKEN.match(token) or int(token) > _LARGEST_TOKEN:
        return record
    if fields["state"] == "done":
        return record if reply is None else replace(record, state="finished", reply=reply)
    try:
        latest = now + _LATEST
        doubt = _doubt(fields["since"], fields["until"], latest)
        crashed = {None: False, "0": False, "1": True}[fields["crashed"]]
        if fields["state"] == "held":
            claimed, ends = _moment(fields["claimed"], latest), _moment(fields["lease"], latest)
            if now < ends:
                return replace(record, state="in_progress", since=claimed, was_abandoned=crashed)
            since = claimed if doubt is None or (doubt.since is not None and claimed < doubt.since) else doubt.since
            until = ends if doubt is None else max(doubt.until, ends)
            return replace(record, state="in_doubt", since=since, until=until, was_abandoned=True)
    except (KeyError, ValueError):
        return record
    if fields["state"] != "free" or fields["since"] is None or fields["until"] is None or fields["crashed"] is None:
        return record
    if doubt is None:
        return replace(record, state="not_sent")
    return replace(record, state="in_doubt", since=doubt.since, until=doubt.until, was_abandoned=crashed)


def _doubt(since: str | None, until: str | None, latest: datetime) -> DoubtWindow | None:
    """Return the window of doubt that a record has; None: none.

    Raises:
        ValueError: it is none.
    """
    if not until:
        if since:
            raise ValueError("it has no end")
        return None
    begins = _moment(since, latest) if since else None
    ends = _moment(until, latest)
    if begins is not None and begins > ends:
        raise ValueError("it ends before it begins")
    return DoubtWindow(begins, ends)


def _moment(text: str | None, latest: datetime) -> datetime:
    if text is None or not _MS.match(text):
        raise ValueError("is no time")
    try:
        moment = datetime.fromtimestamp(int(text) / 1000, UTC)
    except OverflowError as exc:
        raise ValueError("is no time") from exc
    if moment > latest:
        raise ValueError("is in the future")
    return moment
