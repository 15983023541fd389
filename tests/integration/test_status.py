"""``onenet-worker status``: what became of a command, on a real broker and a real Redis."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pika
import pytest
import redis
from pydantic import SecretStr

from schemas.reply import Reply, ReplyError
from schemas.result import Result
from tests.support.builders import AN_IMEI, a_command
from tests.support.command_line import run_cli
from tests.support.deployment import Deployment
from tests.support.simulator import onenet
from tests.support.stores import LONG_S, held, key
from tests.support.terminal import assert_screen, show
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.core.claims import Key
from worker.core.doubt_window import DoubtWindow
from worker.core.times import milliseconds
from worker.dead_letters.reader import DeadLetterReader
from worker.dev.services.ports import free_port, wait_until
from worker.idempotency.redis import RedisStore
from worker.settings import Settings

NOW = datetime(2026, 11, 30, 8, tzinfo=UTC)
KEPT_UNTIL = datetime(2060, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC)
DOUBT = DoubtWindow(NOW, NOW + timedelta(seconds=13))
U1 = str(UUID(int=1))
BILLING = replace(key("order-17"), app_id="billing")


@dataclass
class Site:
    """A deployment whose records are in Redis."""

    deployment: Deployment
    redis_url: str
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AMQP_URL": self.deployment.broker_url,
            "WORKER_NAMESPACE": self.deployment.topology.namespace,
            "IDEMPOTENCY_URL": self.redis_url,
        }

    def status(self, *arguments: str, **environment: str) -> Any:
        return run_cli("status", *arguments, folder=self.folder, **self.environment | environment)

    def told(self, *arguments: str, exit_code: int = 0, **environment: str) -> Any:
        """Return what ``--json`` says."""
        result = self.status(*arguments, "--json", **environment)
        assert result.returncode == exit_code, result.stderr
        return json.loads(result.stdout)

    def record(self, write: Callable[[RedisStore], Awaitable[object]], owner_id: str = "order-17") -> None:
        """Write records as workers do; that of one command is kept until a time that a screen can show."""
        namespace = self.deployment.topology.namespace

        async def run() -> None:
            store = RedisStore(self.redis_url, namespace, ttl_s=3600, lease_s=LONG_S)
            await write(store)
            await store.close()

        asyncio.run(run())
        with closing(redis.Redis.from_url(self.redis_url)) as client:
            client.pexpireat(f"{{{namespace}}}:command:{owner_id}", milliseconds(KEPT_UNTIL))

    def set_fields(self, **fields: Any) -> None:
        with closing(redis.Redis.from_url(self.redis_url)) as client:
            client.hset(f"{{{self.deployment.topology.namespace}}}:command:order-17", mapping=fields)

    def dead_letter(
        self,
        command_id: str,
        app_id: str = "billing",
        reason: str = "outcome_unknown",
        expired_time: str = "2026-12-24T08:00:00Z",
    ) -> None:
        headers = {
            "x-onenet-reason": reason,
            "x-onenet-error": "the answer was lost, and the device's history could not be read for as long as it "
            "was tried: HTTP 503, text/html",
            "x-onenet-failed-at": NOW.isoformat(),
        }
        body = json.dumps(a_command(command_id=command_id, expired_time=expired_time)).encode()
        self.deployment.upstream.channel.basic_publish(
            self.deployment.topology.dead_letters_exchange,
            f"execute.{reason}",
            body,
            pika.BasicProperties(delivery_mode=2, headers=headers, app_id=app_id),
        )


@pytest.fixture
def site(broker_url: str, redis_url: str, tmp_path: Path) -> Iterator[Site]:
    with onenet() as simulator, Deployment.set_up(broker_url, tmp_path, simulator) as found:
        declare_on(found.upstream.channel, found.topology)
        yield Site(found, redis_url, tmp_path)


def a_reply(**changes: Any) -> Reply:
    fields: dict[str, Any] = {
        "command_id": "order-17", "status": "accepted", "uuid": U1, "imei": AN_IMEI, "attempts": 1,
        "completed_at": NOW + timedelta(seconds=1),
    }  # fmt: skip
    return Reply(**fields | changes)


FAILURE = a_reply(
    status="failed", uuid=None, attempts=10,
    error=ReplyError(code="outcome_unknown", message="the answer was lost, and the device's history could not decide"),
)  # fmt: skip
REJECTION = a_reply(
    status="rejected", uuid=None, error=ReplyError(code="onenet_rejected", errno=3, message="token鉴权失败")
)
RESULT = Result(
    command_id="order-17", uuid=U1, imei=AN_IMEI, result="failed", confirm_status="TIME_OUT",
    sent_at=NOW + timedelta(minutes=1), confirmed_at=NOW + timedelta(minutes=2), observed_at=NOW + timedelta(minutes=3),
)  # fmt: skip


async def claim(store: RedisStore, of: Key = BILLING) -> None:
    await store.claim(of, NOW)


async def release(store: RedisStore) -> None:
    await store.release(held(await store.claim(BILLING, NOW)), None)


async def release_in_doubt(store: RedisStore) -> None:
    await store.release(held(await store.claim(BILLING, NOW)), DOUBT)


def finishing(reply: Reply, result: Result | None = None, of: Key = BILLING) -> Callable[[RedisStore], Awaitable[None]]:
    async def finish(store: RedisStore) -> None:
        await store.complete(held(await store.claim(of, NOW)), reply, DOUBT)
        if result is not None:
            await store.first_results([(of.app_id, result)])

    return finish


WRITES: dict[str, Callable[[RedisStore], Awaitable[object]]] = {
    "in-progress": claim,
    "not-sent": release,
    "in-doubt": release_in_doubt,
    "abandoned": claim,
    "accepted": finishing(a_reply(recovered=True)),
    "result": finishing(a_reply(), RESULT),
    "rejected": finishing(REJECTION),
    "failed": finishing(FAILURE),
    "unreadable": release,
}
EXPECTED = {"abandoned": "in_doubt"} | dict.fromkeys(["accepted", "result", "rejected", "failed"], "finished")


def prepare(site: Site, state: str) -> None:
    site.record(WRITES[state])
    if state == "abandoned":
        site.set_fields(lease=milliseconds(NOW + timedelta(seconds=90)))
    if state == "unreadable":
        site.set_fields(state="gone")
    if state == "failed":
        site.dead_letter("order-17")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("state", WRITES)
def test_each_state_has_a_screen(state: str, columns: int, site: Site) -> None:
    prepare(site, state)
    screen = show(["status", "order-17"], site.folder, site.environment, columns=columns)
    assert screen.exit_code == 0
    assert_screen(f"status-{state}-{columns}", screen.text, {site.deployment.topology.namespace: "test-00000000"})


@pytest.mark.parametrize("state", WRITES)
def test_json_has_the_record_and_what_to_do_next(state: str, site: Site) -> None:
    prepare(site, state)
    told = site.told("order-17", "--source", "billing")
    [record] = told["records"]
    assert (record["source"], record["state"]) == ("billing", EXPECTED.get(state, state.replace("-", "_")))
    assert told["is_known"] is True
    assert bool(told["next_steps"]) == (state != "result")
    [obstacle] = told["obstacles"]
    assert (obstacle["kind"], obstacle["scope"]) == ("no_worker", None)
    assert obstacle["text"] == f"no worker consumes {site.deployment.topology.execute_queue}"
    assert len(told["dead_letters"]) == (state == "failed")
    assert (record["reply"] is not None) == (EXPECTED.get(state) == "finished")


def test_a_dead_letter_without_a_record_is_told_as_well(site: Site) -> None:
    """The record has expired, or was in the memory of a worker that has ended."""
    site.dead_letter("order-17")
    site.dead_letter("order-18")
    told = site.told("order-17")
    assert (told["records"], [letter["reason"] for letter in told["dead_letters"]]) == ([], ["outcome_unknown"])
    [replay, no_worker] = told["next_steps"]
    look = f"onenet-worker device {AN_IMEI}"
    [letter] = told["dead_letters"]
    assert replay["commands"] == [look, f"onenet-worker dead-letters replay {letter['digest'][:8]} --wait"]
    assert no_worker["text"].startswith("commands may wait: no worker consumes")


def test_the_dead_letter_of_another_system_is_not_replayed_with_it(site: Site) -> None:
    """Both have used the same id."""
    for app_id in ("billing", "payroll"):
        site.dead_letter("order-17", app_id)
    told = site.told("order-17", "--source", "billing")
    [letter] = told["dead_letters"]
    assert letter["source"] == "billing"
    commands = [command for step in told["next_steps"] for command in step["commands"] if "replay" in command]
    assert commands == [f"onenet-worker dead-letters replay {letter['digest'][:8]} --wait"]


def test_what_has_expired_needs_no_worker(site: Site) -> None:
    """A replay would fail at once, whatever keeps commands from being sent."""
    site.dead_letter("order-17", reason="retries_exhausted", expired_time="2026-08-24T08:00:00Z")
    told = site.told("order-17")
    [discard] = told["next_steps"]
    [letter] = told["dead_letters"]
    assert discard["commands"] == [f"onenet-worker dead-letters discard {letter['digest'][:8]}"]
    assert [obstacle["kind"] for obstacle in told["obstacles"]] == ["no_worker"]


def test_a_digest_or_a_beginning_means_the_command_of_a_dead_letter(site: Site) -> None:
    site.dead_letter("order-17")
    site.dead_letter("order-18")
    [letter] = site.told("order-17")["dead_letters"]
    for text in ("order-17", letter["digest"], letter["digest"][:8]):
        assert site.told(text)["command_id"] == "order-17"
    reasons = site.told("order-1", exit_code=1)["possible_reasons"]
    assert reasons[0] == "it means one of the dead letters order-17, order-18: see onenet-worker dead-letters show"


def test_a_database_that_redis_does_not_have_is_one_line(site: Site) -> None:
    result = site.status("order-17", IDEMPOTENCY_URL=f"{site.redis_url.rpartition('/')[0]}/99")
    assert result.returncode == 1
    assert "DB index is out of range" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_ids_belong_to_their_systems(site: Site) -> None:
    site.record(finishing(a_reply()))
    site.record(finishing(FAILURE, of=replace(BILLING, app_id="payroll")), "order-17/payroll")
    assert [each["source"] for each in site.told("order-17")["records"]] == ["billing"]
    assert [each["source"] for each in site.told("order-17", "--source", "payroll")["records"]] == ["payroll"]
    site.dead_letter("order-17", "payroll")
    told = site.told("order-17")
    assert [each["source"] for each in told["records"]] == ["billing", "payroll"]
    assert site.told("order-17", "--source", "billing")["dead_letters"] == []
    unknown = site.status("order-17", "--source", "third")
    assert unknown.returncode == 1
    assert "leave out --source" in unknown.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_nothing_known_says_what_that_can_mean(columns: int, site: Site) -> None:
    for number in range(3):
        site.deployment.upstream.publish(a_command(command_id=f"other-{number}"))
    wait_until(
        lambda: site.deployment.upstream.count(site.deployment.topology.execute_queue) == 3, PATIENCE_S, "the commands"
    )
    screen = show(["status", "order-17"], site.folder, site.environment, columns=columns)
    assert screen.exit_code == 1
    replaced = {site.deployment.topology.namespace: "test-00000000"}
    assert_screen(f"status-unknown-{columns}", screen.text, replaced)


@pytest.mark.parametrize("columns", [80, 120])
def test_with_the_memory_of_workers_the_rest_is_told(columns: int, site: Site) -> None:
    site.dead_letter("order-17")
    environment = site.environment | {"IDEMPOTENCY_URL": "memory://"}
    screen = show(["status", "order-17"], site.folder, environment, columns=columns)
    assert screen.exit_code == 0
    replaced = {site.deployment.topology.namespace: "test-00000000"}
    assert_screen(f"status-memory-{columns}", screen.text, replaced)
    nothing = site.status("order-18", IDEMPOTENCY_URL="memory://")
    assert nothing.returncode == 1
    assert "records are in the workers' memory" in nothing.stdout


def test_a_worker_writes_what_it_tells(site: Site) -> None:
    settings = {"IDEMPOTENCY_URL": site.redis_url}
    with site.deployment.worker(**settings):
        site.deployment.upstream.publish(a_command(command_id="order-17"), app_id="billing")
        uuid = site.deployment.upstream.reply().json["uuid"]
        told = site.told("order-17", "--source", "billing")
    assert told["records"][0]["reply"]["uuid"] == uuid
    assert told["obstacles"] == []
    assert [step["commands"] for step in told["next_steps"]] == [[f"onenet-worker device {AN_IMEI}"]]


def test_what_cannot_be_read_is_said_beside_the_rest(site: Site) -> None:
    site.record(finishing(a_reply()))
    port = free_port()
    without_broker = site.status("order-17", AMQP_URL=f"amqp://me:aSecret@127.0.0.1:{port}/")
    assert without_broker.returncode == 1
    assert U1 in without_broker.stdout
    assert f"127.0.0.1:{port} cannot be reached" in without_broker.stderr
    site.dead_letter("order-17")
    wait_until(
        lambda: site.deployment.upstream.count(site.deployment.topology.dead_letters_exchange) == 1,
        PATIENCE_S,
        "the letter",
    )
    without_redis = site.status("order-17", IDEMPOTENCY_URL=f"redis://me:aSecret@127.0.0.1:{port}/0")
    assert without_redis.returncode == 1
    assert "outcome_unknown" in without_redis.stdout
    assert "could not be read: the record: Redis" in without_redis.stderr
    assert "aSecret" not in without_redis.stderr + without_broker.stderr
    assert "there is none" not in without_redis.stdout
    unread = site.status("order-17", "--json", IDEMPOTENCY_URL=f"redis://127.0.0.1:{port}/0")
    assert json.loads(unread.stdout)["records"] is None
    settings = Settings(
        amqp_url=(SecretStr(site.deployment.broker_url),), worker_namespace=site.deployment.topology.namespace
    )
    with DeadLetterReader(settings.broker_address, site.deployment.topology, settings.platform_zone):
        busy = site.status("order-17")
    assert (busy.returncode, U1 in busy.stdout) == (1, True)
    assert "another command is reading the dead letters" in busy.stderr


def test_a_dead_letter_that_could_not_be_looked_for_is_not_called_discarded(site: Site) -> None:
    failed = ReplyError(code="expired", message="too late")
    site.record(finishing(a_reply(status="failed", uuid=None, error=failed)))
    settings = Settings(
        amqp_url=(SecretStr(site.deployment.broker_url),), worker_namespace=site.deployment.topology.namespace
    )
    with DeadLetterReader(settings.broker_address, site.deployment.topology, settings.platform_zone):
        [step] = site.told("order-17", exit_code=1)["next_steps"]
    assert step["text"].startswith("its dead letter was not found, because not all of them could be read")
    [step] = site.told("order-17")["next_steps"]
    assert step["text"] == "its dead letter was discarded, or replayed and is waiting"


def test_what_is_no_command_id_is_a_wrong_argument(tmp_path: Path) -> None:
    refused = run_cli("status", "an order", folder=tmp_path)
    assert refused.returncode == 2
    assert "is no command id" in refused.stderr
