"""``make fuzz``: each target for some minutes, after its corpus. A failed run is repeated with its seed.

``--file`` checks one input alone, such as one that a run has found.
"""

import argparse
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from scripts import services
from tests.fuzz import answers, bodies, broker, histories, records, tables
from tests.fuzz.target import Failure, Servers, Target, error_of, fuzz, run_corpus
from worker.dev.services.broker import start_local_broker
from worker.dev.services.redis import start_local_redis

TARGETS = {
    module.TARGET.name: module.TARGET for module in (bodies, tables, broker, answers, histories, records)
}  # fmt: skip


def servers(stack: ExitStack) -> Servers:
    """Return the servers that AMQP_URL and REDIS_URL name, or private ones that end with the stack."""

    def rabbitmq() -> str:
        if named := os.environ.get("AMQP_URL"):
            return named
        services.provide("rabbitmq")
        return start_local_broker(stack).url

    def redis() -> str:
        if named := os.environ.get("REDIS_URL"):
            return named
        services.provide("redis")
        return start_local_redis(stack).url

    return Servers(rabbitmq, redis)


def _run(target: Target, seconds: float, seed: int) -> bool:
    """Run one target; returns whether it failed."""
    with ExitStack() as stack:
        check = stack.enter_context(target.open(servers(stack)))
        failures = list(run_corpus(target, check))
        began = time.monotonic()
        inputs, found = fuzz(target, check, seconds, seed)
        took_s = time.monotonic() - began
    rate = f"{inputs / took_s:.1f} a second" if inputs else "none"
    print(
        f"{target.name}: {len(target.corpus)} inputs of the corpus, {inputs} new ones ({rate}), seed {seed}", flush=True
    )
    for failure in [*failures, *([] if found is None else [found])]:
        _show(target, failure)
    return bool(failures) or found is not None


def _run_file(target: Target, file: Path) -> bool:
    with ExitStack() as stack:
        check = stack.enter_context(target.open(servers(stack)))
        if (error := error_of(check, file.read_bytes())) is not None:
            _show(target, Failure(error, file))
            return True
    print(f"{target.name}: {file} holds")
    return False


def _show(target: Target, failure: Failure) -> None:
    error = failure.error.with_traceback(failure.error.__traceback__)
    error.__notes__ = []  # Hypothesis repeats the input, which the file has
    traceback.print_exception(error)
    print(f"  again: python -m tests.fuzz --targets {target.name} --file {failure.file}", flush=True)


def _run_in_parallel(names: Sequence[str], seconds: float, seed: int) -> bool:
    """Run each target in a process of its own; returns whether one failed."""
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", str(seconds), "--seed", str(seed), "--targets"]
    processes = [subprocess.Popen([*command, name]) for name in names]
    return sum(map(subprocess.Popen.wait, processes)) > 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for each target")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated: which of them")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--parallel", action="store_true", help="all targets at once")
    parser.add_argument("--file", type=Path, help="check one input")
    chosen = parser.parse_args()
    names = chosen.targets.split(",")
    os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # the servers run on this machine
    if chosen.file is not None:
        return int(_run_file(TARGETS[names[0]], chosen.file))
    if chosen.parallel:
        return int(_run_in_parallel(names, chosen.seconds, chosen.seed))
    return int(sum(_run(TARGETS[name], chosen.seconds, chosen.seed) for name in names) > 0)


if __name__ == "__main__":
    sys.exit(main())
