"""Tries commands that may have crashed a worker: one at a time, each announced before it is tried."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace

from worker.core.claims import IdempotencyStore
from worker.core.clock import Clock
from worker.core.decide import RetryPolicy, postponed
from worker.core.doubt import doubt_while_sending, extended
from worker.core.envelope import Task
from worker.core.outcome import Failed, reply_to
from worker.core.parsing import as_command_id
from worker.core.poison import MAX_CRASHES, crash_count
from worker.core.resolution import Conclude, Postpone, Replaced, Resolution, Unpublished
from worker.errors import StoreError
from worker.processing.attempt import Attempt
from worker.processing.leases import Leases

SUSPECT_WAIT_S = 1.0  # how long one suspect waits for another
ANNOUNCE_S = 2.0  # how long the confirm of an announcement may take

ReplaceWith = Callable[[Unpublished], Awaitable[bool]]
"""Publishes a resolution and acknowledges the message; tells whether it was confirmed within ``ANNOUNCE_S``."""

GoOn = Callable[[Attempt], Awaitable[Unpublished]]
"""Makes the attempt."""


class CrashGuard:
    """Lets one suspect at a time be tried.

    Args:
        store: holds the leases.
        leases: ends them.
        policy: when to try again.
        now: the time, aware.
    """

    def __init__(self, store: IdempotencyStore, leases: Leases, policy: RetryPolicy, now: Clock) -> None:
        self._store = store
        self._leases = leases
        self._policy = policy
        self._now = now
        self._one_suspect = asyncio.Lock()

    async def run(self, attempt: Attempt, replace_with: ReplaceWith, go_on: GoOn) -> Resolution:
        """Announce an attempt and make it.

        The announcement must be confirmed before the attempt: a copy with a higher crash count replaces the message.
        The copy returns later and picks up the recorded outcome. If there is none, the attempt crashed its worker.

        Args:
            attempt: at a suspect.
            replace_with: publishes the copy.
            go_on: makes the attempt.
        """
        envelope, policy = attempt.envelope, self._policy
        if not await self._acquire():
            return await self._postpone_second(attempt)
        try:
            copy = postponed(
                envelope,
                policy,
                "it may have crashed a worker: the attempt is announced first",
                doubt_while_sending(attempt.doubt, self._now()),
                holder_crashed=True,
            )
            if not await replace_with(replace(copy, crash_count=crash_count(envelope) + 1)):
                with suppress(StoreError):  # otherwise the end of the lease tells
                    await self._store.release(attempt.lease, attempt.doubt, holder_crashed=True)
                return Replaced(None)
            return Replaced(await go_on(replace(attempt, is_announced=True)))
        finally:
            self._one_suspect.release()

    async def run_last(self, attempt: Attempt, replace_with: ReplaceWith, reconcile: GoOn) -> Resolution:
        """Reconcile a command that has crashed too many workers to be sent once more.

        Its outcome is published before the next suspect is tried. Otherwise a suspect that crashes the worker would
        have innocent ones, tried along with it, returned as often as itself and taken for poison too.

        Args:
            attempt: at the command.
            replace_with: publishes the result.
            reconcile: reads its history.
        """
        if not await self._acquire():
            return await self._postpone_second(attempt)
        try:
            result = await reconcile(attempt)
            await replace_with(result)
            return Replaced(result)
        finally:
            self._one_suspect.release()

    async def _acquire(self) -> bool:
        """Wait for the suspect that is being tried, for a second at most."""
        try:
            async with asyncio.timeout(SUSPECT_WAIT_S):
                return await self._one_suspect.acquire()
        except TimeoutError:
            return False

    async def _postpone_second(self, attempt: Attempt) -> Unpublished:
        reason = "another suspected command is being tried"
        return await self._leases.release(
            attempt, postponed(attempt.envelope, self._policy, reason, attempt.doubt, holder_crashed=True)
        )

    def postpone_unparsed(self, task: Task) -> Postpone | Conclude:
        """Postpone a message that is returned again and again, before the broker dead-letters it without a reply.

        Most were only held by workers that crashed for another reason. The message is not parsed, because parsing it
        may be the reason.
        """
        envelope = task.envelope
        count = (envelope.crash_count or 0) + 1
        if count > MAX_CRASHES:
            failed = Failed("poison_message", "the worker crashed again and again before it had parsed this message")
            command_id = as_command_id(envelope.message_id)
            return Conclude(failed, reply_to(failed, envelope.attempt, command_id, None, self._now()))
        return Postpone(
            self._policy.delays_s[0],
            envelope.attempt,
            "its message was returned too often to be parsed",
            extended(envelope.doubt, self._now()),
            is_free=envelope.is_free_attempt,
            crash_count=count,
        )
