"""What a message may claim where upstream systems do not trust each other."""

import json
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from tests.support.builders import AN_IMEI, a_command
from worker.core.command import Command
from worker.core.doubt_window import DoubtWindow
from worker.core.envelope import Envelope, Replay
from worker.core.parsing import read_task
from worker.core.tenants import own_reply_to
from worker.errors import InvalidCommand, InvalidMessage, RefusedInDoubt

SHANGHAI = ZoneInfo("Asia/Shanghai")
NOW = datetime(2026, 8, 5, 12, tzinfo=UTC)


def read(envelope: Envelope, body: bytes | None = None, *, is_isolated: bool = True) -> object:
    wanted = a_body() if body is None else body
    return read_task(envelope, wanted, SHANGHAI, 0.0, is_isolated=is_isolated).parsed


def a_body(**changes: Any) -> bytes:
    return json.dumps(a_command(**changes)).encode()


@pytest.mark.parametrize("reply_to", [None, "billing", "billing.invoices", "billing.", "billing" + ".a" * 9])
def test_a_command_is_taken_whose_sender_the_broker_vouches_for(reply_to: str | None) -> None:
    envelope = Envelope(app_id="billing", user_id="billing", reply_to=reply_to)
    command = read(envelope)
    assert isinstance(command, Command)
    assert command.app_id == "billing"
    assert own_reply_to(envelope) == reply_to


@pytest.mark.parametrize(
    ("envelope", "field"),
    [
        (Envelope(app_id="billing"), "user_id"),
        (Envelope(), "user_id"),
        (Envelope(app_id="execute", user_id="execute", reply_to="execute.accepted.billing"), "user_id"),
        (Envelope(app_id="billing", user_id="metering"), "app_id"),
        (Envelope(user_id="billing"), "app_id"),
        (Envelope(app_id="Billing", user_id="billing"), "app_id"),
        (Envelope(app_id="billing", user_id="billing", reply_to="metering"), "reply_to"),
        (Envelope(app_id="billing", user_id="billing", reply_to="billings.x"), "reply_to"),
        (Envelope(app_id="billing", user_id="billing", reply_to=".billing"), "reply_to"),
        (Envelope(app_id="billing", user_id="billing", reply_to="billing" + ".a" * 10), "reply_to"),
        (Envelope(app_id="billing", user_id="billing", reply_to="execute.accepted.metering"), "reply_to"),
    ],
    ids=str,
)
def test_any_other_claim_is_an_invalid_command_that_names_the_property(envelope: Envelope, field: str) -> None:
    error = read(envelope)
    assert isinstance(error, InvalidCommand)
    assert [detail.field for detail in error.details] == [field]
    assert error.command_id is not None
    assert own_reply_to(envelope) is None
    assert isinstance(read(envelope, is_isolated=False), Command)


@pytest.mark.parametrize(
    "delivery",
    [{}, {"is_copy": True, "is_unstarted": True}],
    ids=["a first delivery", "a copy of one that no worker has started"],
)
def test_a_refused_command_that_was_never_sent_is_invalid(delivery: dict[str, Any]) -> None:
    error = read(Envelope(app_id="billing", **delivery))
    assert isinstance(error, InvalidCommand)


@pytest.mark.parametrize(
    "delivery",
    [
        {"is_redelivered": True},
        {"is_redelivered": True, "is_copy": True, "is_unstarted": True},
        {"doubt": DoubtWindow(None, NOW)},
        {"is_copy": True, "is_unstarted": True, "doubt": DoubtWindow(None, NOW)},
        {"is_copy": True},  # the message that it was copied from may have come back, and been sent
        {"is_copy": True, "attempt": 2},
        {"is_copy": True, "replay": Replay(NOW, None)},
    ],
    ids=str,
)
def test_a_refused_command_that_may_have_been_sent_before_has_an_unknown_outcome(delivery: dict[str, Any]) -> None:
    """It may have been taken while the systems still trusted each other."""
    error = read(Envelope(app_id="billing", message_id="an-id", **delivery), a_body(command_id="an-id"))
    assert isinstance(error, RefusedInDoubt)
    assert (error.code, error.command_id, error.imei) == ("outcome_unknown", "an-id", AN_IMEI)
    assert [detail.field for detail in error.details] == ["user_id"]
    assert isinstance(read(Envelope(app_id="billing", user_id="billing", **delivery)), Command)


@pytest.mark.parametrize("is_redelivered", [False, True])
def test_an_unreadable_message_is_invalid_no_matter_who_sent_it(*, is_redelivered: bool) -> None:
    assert isinstance(read(Envelope(app_id="billing", is_redelivered=is_redelivered), b"{"), InvalidMessage)
