"""What a claim and an outcome cost on a Redis: ``python -m bench.store redis://host:port/0 --replicas 1``."""

import argparse
import asyncio
import statistics
import time
from datetime import UTC, datetime
from uuid import uuid4

from schemas.reply import Reply
from worker.core.claims import Key, Unseen
from worker.core.doubt_window import DoubtWindow
from worker.idempotency.redis import RedisStore


async def measure(url: str, replicas: int, commands: int, concurrency: int, *, is_young: bool) -> str:
    """Claim and complete new commands, so many at once; returns a line with the results.

    ``is_young``: each arrival is recorded too, as in the first hour of an epoch.
    """
    store = RedisStore(url, f"bench-{uuid4().hex}", ttl_s=600, lease_s=60, replicas=replicas)
    numbers, took_s = iter(range(commands)), list[float]()
    now = datetime.now(UTC)

    async def run() -> None:
        for number in numbers:
            began = time.perf_counter()
            name = f"c{number}"
            key = Key(name, b"1" * 16, number.to_bytes(16, "big"))
            arrival = [store.note_arrival(key, now)] if is_young else []
            claim, *_ = await asyncio.gather(store.claim(key, now), *arrival)
            assert isinstance(claim, Unseen)
            reply = Reply(command_id=name, status="accepted", uuid=str(uuid4()), attempts=1, completed_at=now)
            await store.complete(claim.lease, reply, DoubtWindow(now, now))
            took_s.append(time.perf_counter() - began)

    await store.ping()
    began, processor_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(run() for _ in range(concurrency)))
    elapsed_s, processor_s = time.perf_counter() - began, time.process_time() - processor_s
    await store.close()
    p99_s = statistics.quantiles(took_s, n=100)[98]
    return (
        f"{concurrency} at once: {commands / elapsed_s:.0f}/s, median {1000 * statistics.median(took_s):.2f} ms, "
        f"p99 {1000 * p99_s:.2f} ms, {1e6 * processor_s / commands:.0f} us of the worker's processor each"
    )


def main() -> None:
    """Measure one command at a time, and 32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--replicas", type=int, default=0)
    parser.add_argument("--young", action="store_true", help="record each arrival, as in the first hour of an epoch")
    arguments = parser.parse_args()
    for concurrency, commands in ((1, 1_500), (32, 12_000)):
        print(asyncio.run(measure(arguments.url, arguments.replicas, commands, concurrency, is_young=arguments.young)))


if __name__ == "__main__":
    main()
