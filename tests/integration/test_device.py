"""``onenet-worker device``: what waits for a device at the platform, and how it is cancelled."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis

from tests.support.builders import AN_IMEI
from tests.support.command_line import run_cli
from tests.support.simulator import ACCESS_KEY, API_KEY, PRODUCT_ID, onenet
from tests.support.stores import DOUBT, LONG_S, held, key, reply
from tests.support.terminal import Screen, assert_screen, show
from worker.dev.services.ports import free_port
from worker.idempotency.redis import RedisStore
from worker.printable import utc
from worker.simulator.devices import CANCELLED, EXPIRED, FAILED, SENT, SUCCESS, WAIT, CachedCommand
from worker.simulator.dialects import PlatformError, Reason
from worker.simulator.faults import Fault
from worker.simulator.platform import Platform
from worker.simulator.server import Simulator

HOUR = timedelta(hours=1)
UNKNOWN, NO_ANSWER = 8, 7
BASE = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - 6 * HOUR
SHOWN_BASE = datetime(2026, 11, 30, 8, tzinfo=UTC)  # stands for it in the screens


@dataclass
class Site:
    """A platform with a device, and the program's settings."""

    simulator: Simulator
    folder: Path
    redis_url: str
    namespace: str = field(default_factory=lambda: f"test-{uuid4().hex[:8]}")
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        usual = {
            "ONENET_URL": self.simulator.url,
            "ONENET_API_KEY": API_KEY,
            "IDEMPOTENCY_URL": self.redis_url,
            "WORKER_NAMESPACE": self.namespace,
            "NO_PROXY": "127.0.0.1",
        }
        return {name: value for name, value in (usual | self.settings).items() if value}

    def device(self, *arguments: str, **environment: str) -> Any:
        return run_cli("device", AN_IMEI, *arguments, folder=self.folder, **self.environment | environment)

    def listed(self, *arguments: str) -> list[Any]:
        result = self.device("--json", *arguments)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    def cache(
        self,
        number: int,
        status: int = WAIT,
        *,
        valid_at: datetime | None = None,
        confirm: str | None = None,
        uuid: str | None = None,
    ) -> CachedCommand:
        """Cache a command at the platform; its uuid by default shows its number, at its beginning and at its end."""
        query = {
            "imei": AN_IMEI,
            "obj_id": "1",
            "obj_inst_id": "2",
            "res_id": "3",
            "expired_time": "2099-01-01T08:00:00",
        }
        platform = self.simulator.platform
        platform.new_uuid = lambda: uuid or uuid_of(number)
        command = platform.execute(query, b"{}")
        command.created_at = BASE + number * HOUR / 2
        command.valid_at = valid_at or command.created_at
        command.send_status = status
        command.confirm_status = confirm
        if status in {SENT, SUCCESS, FAILED, NO_ANSWER}:
            command.sent_at = command.created_at + timedelta(minutes=1)
        if confirm is not None:
            command.confirmed_at = command.created_at + timedelta(minutes=2)
        return command

    def own(self, number: int, command_id: str, app_id: str = "billing") -> None:
        """Record whose command a uuid is, as a worker does."""

        async def run() -> None:
            store = RedisStore(self.redis_url, self.namespace, ttl_s=3600, lease_s=LONG_S)
            lease = held(await store.claim(replace(key(command_id), app_id=app_id), datetime.now(UTC)))
            await store.complete(lease, reply(command_id, uuid_of(number)), DOUBT)
            await store.close()

        asyncio.run(run())

    def states(self) -> list[int]:
        return [command.send_status for command in self.simulator.platform.commands]


def uuid_of(number: int) -> str:
    return str(UUID(int=(number << 120) + number))


@pytest.fixture(params=["v1", "v2"])
def site(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Iterator[Site]:
    with onenet() as simulator:
        made = Site(simulator, tmp_path, redis_url)
        if request.param == "v2":
            made.settings = {"ONENET_API": "v2", "ONENET_API_KEY": ""}
            made.settings |= {"ONENET_PRODUCT_ID": PRODUCT_ID, "ONENET_ACCESS_KEY": ACCESS_KEY}
        yield made


only_v1 = pytest.mark.parametrize("site", ["v1"], indirect=True)


def test_each_command_is_told_with_its_state_and_our_id(site: Site) -> None:
    site.cache(1, SUCCESS, confirm="SUCCESS")
    site.cache(2, FAILED, confirm="TIME_OUT")
    site.cache(3, valid_at=datetime.now(UTC) + HOUR)
    site.own(1, "order-1")
    found = site.listed()
    assert [(each["uuid"], each["state"], each["confirm_status"]) for each in found] == [
        (uuid_of(3), "waiting", None), (uuid_of(2), "failed", "TIME_OUT"), (uuid_of(1), "executed", "SUCCESS"),
    ]  # fmt: skip
    assert (found[2]["command_id"], found[2]["command_id_is_certain"]) == ("order-1", True)
    assert found[0]["command_id"] is None
    created = BASE + HOUR / 2
    assert found[2]["created_at"] == utc(created)
    assert found[2]["sent_at"] == utc(created + timedelta(minutes=1))
    assert found[2]["confirmed_at"] == utc(created + timedelta(minutes=2))
    assert found[2]["expires_at"] == "2099-01-01T00:00:00Z"
    assert not site.simulator.requests  # nothing was sent


@only_v1
def test_order_and_limit_and_how_many_there_are(site: Site) -> None:
    for number in range(130):
        command = site.cache(number, CANCELLED, uuid=f"n{number:03}")
        command.created_at = BASE - 200 * HOUR + number * HOUR
    assert [each["uuid"] for each in site.listed("--limit", "2")] == ["n129", "n128"]
    assert [each["uuid"] for each in site.listed("--limit", "2", "--oldest-first")] == ["n000", "n001"]
    assert len(site.listed("--limit", "125")) == 125
    assert "showing the newest 20 of 130 commands; --limit shows more" in site.device().stderr


def test_a_command_is_cancelled_before_its_valid_time(site: Site) -> None:
    site.cache(1, valid_at=datetime.now(UTC) + HOUR)
    site.cache(2, valid_at=datetime.now(UTC) + HOUR)
    cancelled = site.device("--cancel", uuid_of(1)[:8], "--yes")
    assert cancelled.returncode == 0, cancelled.stderr
    assert "cancelled 1 of 1 command" in cancelled.stderr
    assert site.states() == [CANCELLED, WAIT]


def test_all_that_wait_are_cancelled(site: Site) -> None:
    site.simulator.platform.cancels_valid = True
    for number in (1, 2, 3):
        site.cache(number)
    site.cache(4, SUCCESS, confirm="SUCCESS")
    cancelled = site.device("--cancel-all", "--yes", "--json")
    assert cancelled.returncode == 0, cancelled.stderr
    assert {(each["uuid"], each["state"]) for each in map(json.loads, cancelled.stdout.splitlines())} == {
        (uuid_of(number), "cancelled") for number in (1, 2, 3)
    }
    assert site.states() == [CANCELLED, CANCELLED, CANCELLED, SUCCESS]


def test_what_the_platform_refuses_to_cancel_still_waits_and_says_why(site: Site) -> None:
    """Documented is also that a command can be cancelled only before its valid_time."""
    site.cache(1)
    refused = site.device("--cancel", uuid_of(1), "--yes", "--json")
    assert refused.returncode == 1
    told = json.loads(refused.stdout)
    assert (told["state"], "does not wait any more" in told["refusal"]) == ("waiting", True)
    assert "cancelled 0 of 1 command" in refused.stderr


@only_v1
def test_what_arrives_meanwhile_is_not_cancelled(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.simulator.platform.cancels_valid = True
    site.cache(1)
    cancel = Platform.cancel

    def cancel_while_one_arrives(platform: Platform, imei: str, uuid: str) -> object:
        site.cache(2)
        return cancel(platform, imei, uuid)

    monkeypatch.setattr(Platform, "cancel", cancel_while_one_arrives)
    cancelled = site.device("--cancel-all", "--yes")
    assert (cancelled.returncode, site.states()) == (0, [CANCELLED, WAIT])


@only_v1
def test_the_state_afterwards_counts_and_not_the_answer(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.cache(1)
    site.cache(2)

    def cancel_and_refuse(platform: Platform, imei: str, uuid: str) -> None:
        del imei
        for command in platform.commands:
            if command.uuid == uuid:
                command.send_status = CANCELLED
        raise PlatformError(Reason.NOT_CANCELLABLE, "too late")

    monkeypatch.setattr(Platform, "cancel", cancel_and_refuse)
    done = site.device("--cancel", uuid_of(1), "--yes")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(Platform, "cancel", lambda *_: None)  # success, and nothing is done
    undone = site.device("--cancel", uuid_of(2), "--yes")
    assert undone.returncode == 1
    assert "waiting" in undone.stdout


@only_v1
def test_an_answer_that_is_lost_is_not_called_a_refusal(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.cache(1)

    def fail(*_: object) -> None:
        raise PlatformError(Reason.TOO_MANY_CALLS, "try later")

    monkeypatch.setattr(Platform, "cancel", fail)
    undone = site.device("--cancel", uuid_of(1), "--yes")
    assert undone.returncode == 1
    assert "gave no clear answer, so that it may be cancelled all the same" in undone.stderr


@only_v1
def test_a_history_that_is_not_shown_whole_cancels_nothing(site: Site) -> None:
    site.cache(1)
    site.cache(2)
    site.simulator.faults.replace([Fault(kind="short_page", endpoint="history")])
    refused = site.device("--cancel-all", "--yes")
    assert refused.returncode == 1
    assert "has 2 commands, and shows 1 of them: nothing was cancelled" in refused.stderr


@only_v1
def test_a_beginning_must_be_that_of_one_command_that_waits(site: Site) -> None:
    site.cache(0x21)
    twin = str(UUID(int=UUID(uuid_of(0x21)).int + 1))
    site.cache(0x22, uuid=twin)
    site.cache(0x31, SUCCESS, confirm="SUCCESS")
    for beginning, said in (
        ("", "--cancel '': give a uuid, or at least its first 8 characters"),
        ("2100000", "--cancel '2100000': give a uuid, or at least its first 8 characters"),
        ("21000000", f"21000000 is the beginning of {twin}, {uuid_of(0x21)}: give more characters"),
        ("40000000", f"no command of device {AN_IMEI} has a uuid that begins with 40000000"),
        ("31000000", f"{uuid_of(0x31)} does not wait any more, so it cannot be cancelled: executed"),
    ):
        refused = site.device("--cancel", beginning, "--yes")
        assert (refused.returncode, said in refused.stderr) == (1, True), refused.stderr
    assert WAIT in site.states()
    assert CANCELLED not in site.states()


@only_v1
def test_nothing_is_cancelled_without_a_yes(site: Site) -> None:
    site.cache(1, valid_at=datetime.now(UTC) + HOUR)
    for options in (["--cancel-all"], ["--cancel", uuid_of(1)]):
        refused = site.device(*options)
        assert refused.returncode == 1
        assert "give --yes" in refused.stderr
    assert show_device(site, 120, "--cancel-all", typed="n\n").exit_code == 1
    assert site.states() == [WAIT]


@only_v1
def test_a_device_without_commands_says_so(site: Site) -> None:
    for options, said in (([], "OneNET has no command"), (["--cancel-all", "--yes"], "no command waits for device")):
        result = site.device(*options)
        assert (result.returncode, result.stdout) == (0, "")
        assert said in result.stderr


@only_v1
def test_requests_count_against_the_rate_limit_that_workers_share(site: Site) -> None:
    site.device(ONENET_RATE_LIMIT="30/hour")  # so slow that Redis keeps it
    with closing(redis.Redis.from_url(site.redis_url)) as client:
        assert list(client.scan_iter(f"{{{site.namespace}}}:rate*"))


@only_v1
def test_without_records_the_rest_is_told(site: Site) -> None:
    site.cache(1)
    memory = site.device(IDEMPOTENCY_URL="memory://")
    assert (memory.returncode, "1" in memory.stdout) == (0, True)
    assert "command ids are in the memory of the workers" in memory.stderr
    gone = site.device(IDEMPOTENCY_URL=f"redis://me:aSecret@127.0.0.1:{free_port()}/0", ONENET_RATE_LIMIT="off")
    assert (gone.returncode, uuid_of(1) in gone.stdout) == (0, True)
    assert "without command ids: Redis: " in gone.stderr
    assert "aSecret" not in gone.stderr


@only_v1
def test_errors_are_one_line_and_say_what_to_do(site: Site) -> None:
    wrong_key = site.device(ONENET_API_KEY="another")
    no_platform = site.device(ONENET_URL=f"http://127.0.0.1:{free_port()}", ONENET_CONNECT_TIMEOUT="1")
    no_product = site.device("--product", "east")
    throttled = site.simulator.platform
    throttled.rate = 0
    too_fast = site.device()
    for result, *words in (
        (wrong_key, "OneNET at ", "errno", "onenet-worker check"),
        (no_platform, "OneNET at ", "try again"),
        (no_product, "no product east is configured"),
        (too_fast, "freq", "try again in a moment"),
    ):
        assert result.returncode == 1
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert all(word in result.stderr for word in words), result.stderr


def test_requests_go_through_the_proxy_of_the_environment(site: Site) -> None:
    port = free_port()
    result = site.device(NO_PROXY="", ONENET_URL="http://platform.invalid", http_proxy=f"http://127.0.0.1:{port}")
    assert result.returncode == 1
    assert "OneNET at platform.invalid: " in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_no_imei_is_a_wrong_argument(tmp_path: Path) -> None:
    refused = run_cli("device", "86582003000000x", folder=tmp_path)
    assert refused.returncode == 2
    assert "is no IMEI" in refused.stderr


def show_device(site: Site, columns: int, *arguments: str, typed: str = "") -> Screen:
    return show(["device", AN_IMEI, *arguments], site.folder, site.environment, columns=columns, typed=typed)


def replaced() -> dict[str, str]:
    """Return the times of this run, and what stands for them."""
    moments = [minutes * timedelta(minutes=1) for minutes in range(12 * 60)]
    return {f"{BASE + after:%Y-%m-%d %H:%M}": f"{SHOWN_BASE + after:%Y-%m-%d %H:%M}" for after in moments}


def assert_device_screen(name: str, screen: Screen) -> None:
    text = screen.text
    placeholders = {time: f"\x00{number:015}" for number, time in enumerate(replaced())}
    for time, placeholder in placeholders.items():
        text = text.replace(time, placeholder)
    for (_, shown), placeholder in zip(replaced().items(), placeholders.values(), strict=True):
        text = text.replace(placeholder, shown)
    assert_screen(name, text)


@only_v1
@pytest.mark.parametrize("columns", [80, 120])
def test_screens(columns: int, site: Site) -> None:
    assert_device_screen(f"device-none-{columns}", show_device(site, columns))
    later = BASE + 11 * HOUR
    site.cache(1, SUCCESS, confirm="SUCCESS")
    site.cache(2, FAILED, confirm="REQ_PARAM_ERROR")
    site.cache(3, EXPIRED)
    site.cache(4, CANCELLED)
    site.cache(5, UNKNOWN, confirm="状态\x1b[2J")
    site.cache(6, NO_ANSWER, confirm="TIME_OUT")
    site.cache(7, SENT).confirmed_at = datetime(2090, 1, 1, tzinfo=UTC)
    site.cache(8)
    site.cache(9, valid_at=later)
    for number, command_id, app_id in ((1, "order-17", "billing"), (9, "f" * 128, "收银台")):
        site.own(number, command_id, app_id)
    site.own(8, "order-17", "payroll")
    assert_device_screen(f"device-list-{columns}", show_device(site, columns))
    assert_device_screen(
        f"device-cancel-refused-{columns}", show_device(site, columns, "--cancel", "08000000", typed="y\n")
    )
    assert_device_screen(f"device-cancel-no-{columns}", show_device(site, columns, "--cancel-all", typed="n\n"))
    site.simulator.platform.cancels_valid = True
    assert_device_screen(f"device-cancel-yes-{columns}", show_device(site, columns, "--cancel-all", typed="y\n"))
