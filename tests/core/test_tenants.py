"""What a message may claim where upstream systems do not trust each other."""

import json
from zoneinfo import ZoneInfo

import pytest

from tests.support.builders import a_command
from worker.core.command import Command
from worker.core.envelope import Envelope
from worker.core.parsing import read_task
from worker.core.tenants import own_reply_to
from worker.errors import InvalidCommand, InvalidMessage

SHANGHAI = ZoneInfo("Asia/Shanghai")


def read(envelope: Envelope, body: bytes | None = None, *, is_isolated: bool = True) -> object:
    wanted = json.dumps(a_command()).encode() if body is None else body
    return read_task(envelope, wanted, SHANGHAI, 0.0, is_isolated=is_isolated).parsed


@pytest.mark.parametrize("reply_to", [None, "billing", "billing.invoices", "billing."])
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


def test_an_unreadable_message_is_invalid_no_matter_who_sent_it() -> None:
    assert isinstance(read(Envelope(app_id="billing"), b"{"), InvalidMessage)
