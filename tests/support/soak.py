"""What a long run must leave as it found it: memory, descriptors and the store's keys."""

from pathlib import Path

import redis

from tests.support.chaos import Scene

MEMORY_MIB = 8  # allowed growth of a worker's resident memory; docs/performance.md has 3 MiB for one without faults
DESCRIPTORS = 4  # a connection of each kind may be between its end and its replacement


class Soak:
    """Compares the end of a run with its beginning; differences become violations of the run.

    Args:
        scene: the run; its workers must not be replaced.
        store_url: of the Redis that only these workers use.
    """

    def __init__(self, scene: Scene, store_url: str) -> None:
        self._scene = scene
        self._store_url = store_url
        self._memory: list[float] = []
        self._descriptors: list[int] = []
        self._keys = 0

    def begin(self) -> None:
        """Measure, once caches and pools are filled."""
        self._memory, self._descriptors, self._keys = self._measure()

    def end(self) -> None:
        """Measure again, under the same load, and note what grew."""
        memory, descriptors, keys = self._measure()
        self._scene.report.notes.append(
            f"memory MiB {_pairs(self._memory, memory)}; descriptors {_pairs(self._descriptors, descriptors)}; "
            f"keys {self._keys} to {keys}"
        )
        for number, (before, after) in enumerate(zip(self._memory, memory, strict=True)):
            if after > before + MEMORY_MIB:
                self._scene.report.grown.append(f"worker {number}: memory {before:.1f} to {after:.1f} MiB")
        for number, (held, holds) in enumerate(zip(self._descriptors, descriptors, strict=True)):
            if holds > held + DESCRIPTORS:
                self._scene.report.grown.append(f"worker {number}: descriptors {held} to {holds}")
        if keys > 1.2 * self._keys:  # records expire after IDEMPOTENCY_TTL, so their number follows the load
            self._scene.report.grown.append(f"keys of the store: {self._keys} to {keys}")

    def _measure(self) -> tuple[list[float], list[int], int]:
        pids = [worker.process.pid for worker in self._scene.fleet.workers]
        with redis.Redis.from_url(self._store_url) as store:
            keys = int(store.dbsize())
        return [_resident_mib(pid) for pid in pids], [_descriptors(pid) for pid in pids], keys


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    [kib] = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(kib) / 1024


def _descriptors(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def _pairs(before: list[float] | list[int], after: list[float] | list[int]) -> str:
    return ", ".join(f"{first:.0f} to {second:.0f}" for first, second in zip(before, after, strict=True))
