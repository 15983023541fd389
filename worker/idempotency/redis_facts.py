"""What a Redis server says of itself, in an operator's words. Pure."""

from collections.abc import Sequence
from typing import Any

from worker.core.claims import Inspection

SECTIONS = ("server", "memory", "persistence", "replication")
OPTIONS = ("appendfsync", "save", "min-replicas-to-write")
UNKNOWN = "unknown"


def inspection(answers: Sequence[Any], wanted_replicas: int, *, has_epoch: bool) -> Inspection:
    """Return what matters for records, and what may cost some.

    Args:
        answers: to ``INFO`` of each of ``SECTIONS`` and then to ``CONFIG GET`` of each of ``OPTIONS``; None where the
            server refused one, as managed services do.
        wanted_replicas: how many replicas must have a claim before it counts.
        has_epoch: the server tells scripts who it is.
    """
    facts = {name: value for text in answers[: len(SECTIONS)] if text for name, value in _lines(str(text))}
    for name, found in zip(OPTIONS, answers[len(SECTIONS) :], strict=True):
        if found is not None:
            # A dict with protocol 3, else a flat list; empty if this server has no such option.
            values = list(found.values()) if isinstance(found, dict) else found[1::2]
            facts[name] = str(values[0]) if values else UNKNOWN
    policy, replicas = facts.get("maxmemory_policy", UNKNOWN), facts.get("connected_slaves", UNKNOWN)
    has_log, fsync = facts.get("aof_enabled") == "1", facts.get("appendfsync", UNKNOWN)
    persistence = f"append-only file, fsync {fsync}" if has_log else "snapshots" if facts.get("save") else "none"
    if "aof_enabled" not in facts or (not has_log and "save" not in facts):
        persistence = UNKNOWN
    warnings = []
    if facts.get("maxmemory", "0") != "0" and policy not in {"noeviction", UNKNOWN}:
        warnings.append(f"maxmemory-policy {policy} removes records when memory is short: set noeviction")
    if persistence == "none" or (persistence == "snapshots" and wanted_replicas == 0):
        warnings.append("a restart of Redis loses records: set appendonly yes, and appendfsync always or replicas")
    if facts.get("role") not in {"master", None}:
        warnings.append("the server is a replica, which accepts no writes")
    if replicas != UNKNOWN and int(replicas) < wanted_replicas:
        warnings.append(f"IDEMPOTENCY_WAIT_REPLICAS is {wanted_replicas}, and {replicas} replicas are connected")
    if not has_epoch:
        warnings.append(
            "the server does not tell scripts who it is (INFO): every redelivery without a record is in doubt"
        )
    version = facts.get("redis_version", UNKNOWN)
    return Inspection(
        (f"version {version}", f"eviction {policy}", f"persistence {persistence}", f"replicas {replicas}"),
        tuple(warnings),
    )


def _lines(text: str) -> list[tuple[str, str]]:
    """Return the names and values of a section of ``INFO``."""
    split = (line.partition(":") for line in text.splitlines() if not line.startswith("#"))
    return [(name, value.strip()) for name, separator, value in split if separator]
