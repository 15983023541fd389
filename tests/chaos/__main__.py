"""``make chaos``: chaos runs on both stores, with a report of each; a failed run is repeated with its seed."""

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from scripts import services
from tests.support.chaos import Plan, run
from worker.dev.services.broker import start_local_broker
from worker.dev.services.redis import start_local_redis


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--seconds", type=float, default=120, help="seconds of faults in each run")
    parser.add_argument("--commands", type=int, default=3000, help="commands published in each run")
    parser.add_argument(
        "--fleets", default="1m,3r,4r", help="comma-separated: number of workers, on memory (m) or Redis (r)"
    )
    chosen = parser.parse_args()
    has_failed = False
    services.provide("rabbitmq", "redis")
    with ExitStack() as stack:
        broker = start_local_broker()
        stack.callback(broker.stop)
        redis = start_local_redis()
        stack.callback(redis.stop)
        for fleet in chosen.fleets.split(","):
            url = redis.url if fleet.endswith("r") else None
            plan = Plan(chosen.seed, chosen.seconds, chosen.commands, int(fleet[:-1]), url)
            folder = Path(tempfile.mkdtemp(prefix=f"onenet-chaos-{fleet}-"))
            report = run(plan, broker, folder)
            print(report, flush=True)
            for name, found in report.violations.items():
                has_failed = True
                print(f"  {name}: {'; '.join(found[:10])}\n  the workers' logs: {folder}", flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
