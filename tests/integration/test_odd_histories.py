"""Reconciliation with histories in unusual formats: a second request needs proof that the first was not cached."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.builders import a_command
from tests.support.deployment import SOON_CERTAIN, Deployment
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform

UNKNOWN, RECOVERED, SENT_AGAIN = "outcome_unknown", "recovered", "sent again"
ARGS = 'say "hi" \U0001f600\n'

# What differs in the list, in the detail and in the args of the detail, and the expected outcome of the command.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "obj_id 3311.0": ({}, {}, {"obj_id": 3311.0, "res_id": " 5850 "}, RECOVERED),
    "type 2": ({"type": 2}, {}, {}, RECOVERED),
    "times with an offset": ({}, {}, {"expired_time": "2099-01-01T00:00:00+08:00"}, RECOVERED),
    "obj_id missing": ({}, {}, {"obj_id": None}, UNKNOWN),
    "retry -1": ({}, {}, {"retry": -1}, UNKNOWN),
    "expired_time without seconds": ({"expired_time": "2099-01-01 00:00"}, {}, {"expired_time": None}, UNKNOWN),
    "create_time in milliseconds": ({"create_time": 1785902401000}, {}, {}, UNKNOWN),
    "type unknown": ({"type": "COMMAND"}, {}, {}, UNKNOWN),
    "no name": ({"cmd_uuid": None}, {}, {}, UNKNOWN),
    "args null": ({}, {"content": {"args": None}}, {}, UNKNOWN),
    "args escaped": ({}, {"content": {"args": ARGS.replace('"', "&quot;")}}, {}, UNKNOWN),
    "args trimmed": ({}, {"content": {"args": ARGS.strip()}}, {}, UNKNOWN),
    "args without the emoji": ({}, {"content": json.dumps({"args": ARGS.replace("\U0001f600", "????")})}, {}, UNKNOWN),
    "create_time of no value": ({"create_time": "1970-01-01 08:00:00"}, {}, {}, UNKNOWN),
    "expired_time in UTC": ({"expired_time": "2098-12-31 16:00:00"}, {}, {"expired_time": None}, UNKNOWN),
    "content a list": ({}, {"content": [ARGS]}, {}, UNKNOWN),
    "args of the detail a text": ({}, {"args": "imei=1"}, {}, UNKNOWN),
    "another obj_id": ({}, {}, {"obj_id": 3312.0}, SENT_AGAIN),
    "other args": ({}, {"content": {"args": 'say "bye" \U0001f600\n'}}, {}, SENT_AGAIN),
    "another expired_time": ({}, {}, {"expired_time": "2099-01-01T00:00:01"}, SENT_AGAIN),
}


def test_only_a_history_entry_that_clearly_differs_allows_a_second_request(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind has its own device; each command was cached once, and its answer was lost."""
    devices = {str(865820031000000 + number): kind for number, kind in enumerate(KINDS)}
    history, detail = Platform.history, Platform.detail

    def odd_history(platform: Platform, query: Mapping[str, str]) -> dict[str, object]:
        page: dict[str, Any] = history(platform, query)
        listed = KINDS[devices[query["imei"]]][0]
        return {"count": str(page["total_count"]), "items": [item | listed for item in page["items"]]}

    def odd_detail(platform: Platform, imei: str, uuid: str) -> dict[str, object]:
        found: dict[str, Any] = detail(platform, imei, uuid)
        _, changes, sent, _ = KINDS[devices[imei]]
        return found | {"args": found["args"] | sent} | changes

    monkeypatch.setattr(Platform, "history", odd_history)
    monkeypatch.setattr(Platform, "detail", odd_detail)
    deployment.simulator.faults.replace([Fault(kind="drop_after_caching", imei=imei, count=1) for imei in devices])
    with deployment.worker(**SOON_CERTAIN):
        for imei, kind in devices.items():
            fields = {"expired_time": "2099-01-01T00:00:00", "retry": 4, "args": ARGS}
            deployment.upstream.publish(a_command(command_id=kind.replace(" ", "_"), imei=imei, **fields))
        replies = {reply["imei"]: reply for reply in deployment.upstream.replies(len(devices))}
        letters = [deployment.upstream.dead_letter() for kind in KINDS.values() if kind[3] == UNKNOWN]

    def outcome(imei: str) -> str:
        reply = replies[imei]
        if reply["status"] == "failed":
            return str(reply["error"]["code"])
        return RECOVERED if reply["recovered"] else SENT_AGAIN

    assert {devices[imei]: outcome(imei) for imei in replies} == {kind: row[3] for kind, row in KINDS.items()}
    requests = Counter(devices[request["query"]["imei"]] for request in deployment.simulator.requests)
    assert requests == {kind: 2 if row[3] == SENT_AGAIN else 1 for kind, row in KINDS.items()}
    assert {letter.headers["x-onenet-reason"] for letter in letters} == {UNKNOWN}
    messages = {devices[imei]: reply["error"]["message"] for imei, reply in replies.items() if reply["error"]}
    assert "(retry)" in messages["retry -1"]
    assert "(args)" in messages["args escaped"]
    uuids = {command.query["imei"]: command.uuid for command in deployment.simulator.platform.commands}
    assert all(uuids[imei] in replies[imei]["error"]["message"] for imei, kind in devices.items() if kind == "retry -1")
