"""A fleet of workers with one Redis, and commands that crash a worker."""

import asyncio
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.builders import a_command
from tests.support.crash_points import crash_at
from tests.support.deployment import RETRY_DELAYS_S, SOON_CERTAIN, Deployment
from tests.support.outcomes import assert_each_accepted_once, publish_many
from tests.support.simulator import answers_held
from tests.support.waiting import PATIENCE_S
from worker.core.claims import Key
from worker.core.poison import MAX_CRASHES
from worker.dev.services.ports import wait_until
from worker.dev.services.redis import LocalRedis
from worker.idempotency.redis import RedisStore
from worker.simulator.faults import Fault

pytestmark = pytest.mark.broker_version


@pytest.fixture
def redis_settings(deployment: Deployment, redis_url: str) -> dict[str, str]:
    """The settings of a fleet whose store already has a record."""
    settings = SOON_CERTAIN | {"IDEMPOTENCY_URL": redis_url}
    with deployment.worker(**settings) as worker:
        deployment.upstream.publish(a_command())
        deployment.upstream.reply()
        worker.process.stop()  # a kill could come before the acknowledgement and repeat the reply
    deployment.simulator.requests.clear()
    return settings


async def claim_another(redis_url: str, namespace: str) -> None:
    """Claim a command as another worker does."""
    store = RedisStore(redis_url, namespace, ttl_s=60, lease_s=9)
    await store.claim(Key("other", b"1" * 16, b"2" * 16), datetime.now(UTC))
    await store.close()


def test_what_was_never_claimed_is_sent_at_once_after_a_kill(
    deployment: Deployment, redis_settings: dict[str, str]
) -> None:
    """It had only waited in the killed worker, which has recorded that it arrived."""
    one_at_a_time = {"IDEMPOTENCY_URL": redis_settings["IDEMPOTENCY_URL"], "WORKER_CONCURRENCY": "1"}
    deployment.simulator.faults.replace([Fault(kind="hang", seconds=2 * PATIENCE_S, count=1)])
    with deployment.worker(**one_at_a_time) as first:
        deployment.upstream.publish(a_command(command_id="under-way"))
        deployment.wait_for_request()
        ids = publish_many(deployment, 2)
        names = [f"{{{deployment.topology.namespace}}}:command:{command_id}" for command_id in ids]
        with redis.Redis.from_url(redis_settings["IDEMPOTENCY_URL"]) as raw:
            wait_until(lambda: raw.exists(*names) == len(names), PATIENCE_S, "the records of the arrivals")
        first.process.kill()
    with deployment.worker(**one_at_a_time) as second:
        replies = {reply["command_id"]: reply for reply in deployment.upstream.replies(len(ids))}
        in_doubt = {event["command_id"] for event in second.events if event["event"] == "command_in_doubt"}
    assert {replies[command_id]["status"] for command_id in ids} == {"accepted"}
    assert [deployment.cached(command_id) for command_id in ids] == [1, 1]
    assert not in_doubt & set(ids)


def test_no_command_is_sent_twice_when_a_worker_is_killed_and_redis_loses_its_claim(
    deployment: Deployment, own_redis: LocalRedis
) -> None:
    """The new Redis has no record of the claim, but one of a later command, so it does not look empty."""
    settings = SOON_CERTAIN | {"IDEMPOTENCY_URL": own_redis.url}
    slow_answer = Fault(kind="slow_drip", seconds=1, count=1)  # the command is cached before it
    deployment.simulator.faults.replace([slow_answer])
    with deployment.worker(**settings) as first:
        deployment.upstream.publish(a_command(command_id="lost", args="lost"))
        wait_until(lambda: deployment.cached("lost") == 1, PATIENCE_S, "the command's caching")
        first.process.kill()
    own_redis.kill()  # it persists nothing, so all records are lost
    own_redis.start()
    asyncio.run(claim_another(own_redis.url, deployment.topology.namespace))
    with deployment.worker(**settings):
        reply = deployment.upstream.reply().json
    assert (reply["command_id"], reply["status"], reply["recovered"]) == ("lost", "accepted", True)
    assert deployment.cached("lost") == 1


def test_a_command_leased_by_another_worker_waits_for_its_outcome(
    deployment: Deployment, redis_settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"IDEMPOTENCY_URL": redis_settings["IDEMPOTENCY_URL"], "WORKER_CONCURRENCY": "1"}
    command = a_command(args="once", command_id="once")
    with deployment.worker(**settings) as one, deployment.worker(**settings) as other:

        def events() -> set[str]:
            return {event["event"] for worker in (one, other) for event in worker.events}

        with answers_held(monkeypatch):
            deployment.upstream.publish(command)
            deployment.wait_for_request()
            deployment.upstream.publish(command)
            wait_until(lambda: "command_postponed" in events(), PATIENCE_S, "the second delivery")
        replies = deployment.upstream.replies(2)
        assert replies[0] == replies[1]
        assert deployment.cached("once") == 1
        assert "idempotency_not_shared" not in events()


def test_no_command_is_sent_while_the_store_is_unavailable(deployment: Deployment, own_redis: LocalRedis) -> None:
    with deployment.worker(**SOON_CERTAIN, IDEMPOTENCY_URL=own_redis.url) as worker:
        own_redis.kill()
        ids = publish_many(deployment, 5)
        worker.wait_for("command_postponed", count=5)
        assert not deployment.simulator.requests
        own_redis.start()
        assert_each_accepted_once(deployment, ids)


def test_a_command_whose_outcome_cannot_be_recorded_is_reconciled(
    deployment: Deployment, own_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis is lost during the request: the answer cannot be recorded, so the command is in doubt."""
    with deployment.worker(IDEMPOTENCY_URL=own_redis.url, **SOON_CERTAIN) as worker:
        with answers_held(monkeypatch):
            deployment.upstream.publish(a_command(command_id="unrecorded", args="unrecorded"))
            deployment.wait_for_request()
            own_redis.kill()
        worker.wait_for("command_postponed", command_id="unrecorded")
        own_redis.start()
        assert_each_accepted_once(deployment, ["unrecorded"])
    assert len(deployment.simulator.requests) == 1


def test_a_command_that_crashes_each_worker_at_once_is_one_message_after_each_crash(
    deployment: Deployment, tmp_path: Path
) -> None:
    """The message that announced the attempt is acknowledged before it begins: otherwise it would come back as well."""
    settings = {**SOON_CERTAIN, "WORKER_IN_DOUBT": "resend", **crash_at(tmp_path, "before request", 1)}
    topology = deployment.topology
    waiting_in = [topology.execute_queue, *(topology.retry_queue(delay_s) for delay_s in RETRY_DELAYS_S)]
    crashes = 0
    with deployment.worker(**settings) as first:
        deployment.upstream.publish(a_command(command_id="poison"))
        first.process.wait(PATIENCE_S)
    while (reply := deployment.upstream.try_reply()) is None:
        crashes += 1
        wait_until(lambda: sum(map(deployment.upstream.count, waiting_in)) > 0, PATIENCE_S, "the message")
        assert sum(map(deployment.upstream.count, waiting_in)) == 1
        with deployment.start_worker(**settings) as worker:
            wait_until(
                lambda: not worker.process.is_running or "command_failed" in {each["event"] for each in worker.events},
                PATIENCE_S,
                "its end",
            )
            if worker.process.is_running:
                worker.process.stop()
    assert reply.json["error"]["code"] == "poison_message"
    assert crashes == MAX_CRASHES + 1  # the first attempt was not announced


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_only_the_command_that_crashes_every_worker_is_poison(
    deployment: Deployment, store: str, request: pytest.FixtureRequest
) -> None:
    """Each worker that tries it is killed when its request, or the read of its history, reaches the platform."""
    poison = a_command(command_id="poison", imei="865820030000999", args="poison")
    settings = {"ONENET_CONNECT_TIMEOUT": "0.4", "ONENET_READ_TIMEOUT": "0.6", "WORKER_RECONCILE_DELAY": "1"}
    settings["IDEMPOTENCY_URL"] = "memory://" if store == "memory" else request.getfixturevalue("redis_url")
    deadly = Fault(kind="hang", seconds=1, imei=poison["imei"])
    deployment.simulator.faults.replace([deadly, deadly.model_copy(update={"endpoint": "history"})])
    over = threading.Event()
    asked = threading.Semaphore(0)
    deployment.simulator.on_fault = asked.release
    running = [deployment.worker(**settings)]

    def kill() -> None:
        while not over.is_set():
            if asked.acquire(timeout=0.1):
                running[-1].process.kill()
                running.append(deployment.start_worker(**settings))

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        deployment.upstream.publish(poison)
        ids = publish_many(deployment, 20)
        replies: dict[str, Any] = {}
        while len(replies) < 21:
            reply = deployment.upstream.reply(2 * PATIENCE_S).json  # six leases have to expire one after the other
            replies[reply["command_id"]] = reply
    finally:
        over.set()
        killer.join()
        running[-1].process.kill()
    assert replies.pop("poison")["error"]["code"] == "poison_message"
    assert [reply for reply in replies.values() if reply["status"] != "accepted"] == []
    assert [deployment.cached(command_id) for command_id in ids] == [1] * 20
    assert deployment.upstream.dead_letter().headers["x-onenet-reason"] == "poison_message"
