"""Many commands at once, and the check that each of them is accepted exactly once."""

from tests.support.builders import a_command
from tests.support.deployment import Deployment


def publish_many(deployment: Deployment, count: int, first: int = 0) -> list[str]:
    """Publish commands, each for another device and with its id as args; returns the ids."""
    ids = [f"command-{number}" for number in range(first, first + count)]
    for number, command_id in enumerate(ids, first):
        imei = str(865820030000000 + number)
        deployment.upstream.publish(a_command(command_id=command_id, imei=imei, args=command_id))
    return ids


def outcomes_of(deployment: Deployment, ids: list[str]) -> dict[str, tuple[str, str | None]]:
    """Read replies until every command has one; returns the status and the uuid of each.

    A reply may arrive more than once, but always with the same outcome.
    """
    replies: dict[str, tuple[str, str | None]] = {}
    while len(replies) < len(ids):
        reply = deployment.upstream.reply().json
        outcome = (reply["status"], reply["uuid"])
        assert replies.setdefault(reply["command_id"], outcome) == outcome
    assert replies.keys() == set(ids)
    return replies


def assert_each_accepted_once(deployment: Deployment, ids: list[str]) -> None:
    """Check that every command is accepted and that the platform cached it once, under the uuid of its reply."""
    outcomes = outcomes_of(deployment, ids)
    cached = {command.args: command.uuid for command in deployment.simulator.platform.commands}
    assert outcomes == {command_id: ("accepted", cached.get(command_id)) for command_id in ids}
    assert [deployment.cached(command_id) for command_id in ids] == [1] * len(ids)
