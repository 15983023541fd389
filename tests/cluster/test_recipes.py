"""The recipes in docs/operations.md: their settings are those of the tests, and each of their commands is run.

So is the command in docs/security.md that creates a user of the Sentinels.
"""

import shlex
import subprocess

import pytest
import redis

from scripts.documents import ROOT, code_blocks
from tests.support import rabbitmq_cluster, redis_sentinel
from tests.support.rabbitmq_cluster import RabbitCluster
from tests.support.redis_sentinel import RedisWithSentinels
from tests.support.security import acl
from tests.support.stores import LONG_S
from tests.support.upstream import Upstream
from tests.support.waiting import PATIENCE_S
from worker.amqp.blocking import declare_on
from worker.amqp.topology import Topology
from worker.errors import StoreUnavailable
from worker.idempotency.redis import RedisStore

pytestmark = pytest.mark.xdist_group("cluster")  # one process of pytest-xdist runs all of them, on one cluster

PAGE = (ROOT / "docs" / "operations.md").read_text()


def section(title: str) -> list[tuple[str, str]]:
    _, _, rest = PAGE.partition(f"## {title}\n")
    return code_blocks(rest.partition("\n## ")[0])


RABBITMQ, REDIS = section("RabbitMQ on three nodes"), section("Redis with Sentinel")


def settings(blocks: list[tuple[str, str]]) -> set[str]:
    return {line for language, code in blocks if language == "ini" for line in code.splitlines()}


def commands(blocks: list[tuple[str, str]]) -> list[list[str]]:
    lines = [line for language, code in blocks if language == "console" for line in code.splitlines()]
    return [shlex.split(line.removeprefix("$ ")) for line in lines]


def test_the_recipe_for_rabbitmq_has_the_settings_of_the_tests() -> None:
    tested = {line.replace("@localhost", "").replace("rabbit", "rabbit@node") if "nodes." in line else line
              for line in rabbitmq_cluster.CONFIGURATION.splitlines()}  # fmt: skip
    assert settings(RABBITMQ) == tested
    assert [code for language, code in RABBITMQ if language == "erlang"] == [rabbitmq_cluster.ADVANCED]


def test_the_recipe_for_redis_has_the_settings_of_the_tests() -> None:
    monitor = {line for line in settings(REDIS) if line.startswith("sentinel monitor")}
    assert monitor == {f"sentinel monitor {redis_sentinel.MASTER_NAME} <primary> 6379 2"}
    tested = (redis_sentinel.SERVER + redis_sentinel.SENTINEL).splitlines()
    assert settings(REDIS) - monitor == set(tested)


def test_the_commands_for_rabbitmq_succeed(cluster: RabbitCluster) -> None:
    first, second, _ = cluster.nodes
    topology = Topology("onenet", (5,))
    upstream = Upstream(second.url, topology)
    declare_on(upstream.channel, topology)
    try:
        for program, *arguments in commands(RABBITMQ):
            here = [argument.replace("rabbit@node", "rabbit") for argument in arguments]
            here = [f"{argument}@localhost" if argument.startswith("rabbit") else argument for argument in here]
            first.run(program, *here)
            if arguments == ["stop"]:
                first.kill()
                first.start()
                cluster.wait_until_whole()
    finally:
        upstream.close()


def test_the_commands_for_redis_succeed(sentinels: RedisWithSentinels) -> None:
    for program, _, port, *arguments in commands(REDIS):
        here = sentinels.sentinels[0].port if port == "26379" else sentinels.primary().port
        found = subprocess.run(
            [program, "-e", "-p", str(here), *arguments], check=True, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert not found.stdout.startswith(("ERR", "NOQUORUM"))


async def test_the_user_of_the_sentinels_has_the_right_that_a_worker_needs(sentinels: RedisWithSentinels) -> None:
    user = "?sentinel_username=worker&sentinel_password=PASSWORD"
    command = acl("worker", port="26379")
    for rights, is_enough in ((command, True), ([*command, "-sentinel|masters"], False)):
        for sentinel in sentinels.sentinels:
            with redis.Redis.from_url(sentinel.url) as raw:
                raw.execute_command(*rights)
        store = RedisStore(sentinels.url + user, "onenet", ttl_s=60, lease_s=LONG_S)
        if is_enough:
            await store.ping()
        else:
            with pytest.raises(StoreUnavailable, match="NOPERM: the user may not run sentinel"):
                await store.ping()
        await store.close()
