"""The errors that the worker raises, and the exit codes of the process.

Each is named for what happened. A library's exceptions are translated into these where the library is called.

::

    WorkerError
    ├── SettingsError            a setting is unusable                         -> exit code 78
    ├── UnusableCommand          poison message: it can never succeed          -> reply `failed`, dead letter
    │   ├── InvalidMessage       the body is not a JSON object
    │   ├── InvalidCommand       a field breaks its rule
    │   └── RefusedInDoubt       so does its sender, and it may have been sent before
    ├── BrokerUnavailable        no connection to RabbitMQ                     -> back off, reconnect
    │   ├── UserRefused          the broker does not let this user in
    │   ├── PublishingBlocked    the broker has a memory or disk alarm     -> wait until it is over
    │   ├── Unconfirmed          a publication was not confirmed           -> publish it again with the same id
    │   ├── AnswersLost          an order was given, its answers were lost -> see what is paused
    │   └── ClosedByBroker       the broker gave a reason
    │       ├── ChannelRefused   it closed a channel
    │       └── ConnectionRefused  it closed the connection
    ├── PublicationHung          the broker does not end to route it       -> the unrouted exchange keeps the reply
    ├── TopologyMismatch         an exchange or queue differs                  -> exit code 78
    ├── TransportError           an HTTP request got no readable response      -> in doubt, or known not sent
    │   └── TLSError             TLS failed
    ├── HistoryUnreadable        a device's history could not be read whole    -> reconcile again later
    ├── PlatformUnusable         OneNET failed the `check` command             -> exit code 1
    ├── StoreError               the idempotency store failed                  -> postpone the command
    │   ├── StoreUnavailable     it did not answer
    │   │   └── StoreRefused     it answered no                            -> pause until it does not
    │   │       └── StoreUnusable  and always will                         -> exit code 78
    │   ├── LeaseLost            another worker has claimed the command
    │   └── UuidTaken            the uuid belongs to another command           -> the command is in doubt
    └── LocalServiceError        a service for demo or tests did not start     -> exit code 1
"""

from schemas.reply import Detail, FailureCode
from worker.printable import printable

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_SOFTWARE = 70  # EX_SOFTWARE and EX_CONFIG of sysexits.h
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130
_MAX_LINE_CHARS = 1000  # it may quote a name from a file


class WorkerError(Exception):
    """Base class of every error that the worker raises.

    Args:
        lines: its text, usually one line.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)

    def __str__(self) -> str:
        return "\n".join(self.args)

    @property
    def lines(self) -> list[str]:
        """Its lines for a terminal: what comes from outside, such as the name of a file, adds no line to them."""
        return [_shortened(printable(line)) for line in self.args]


def _shortened(line: str) -> str:
    return line if len(line) <= _MAX_LINE_CHARS else f"{line[:_MAX_LINE_CHARS]}…"


class SettingsError(WorkerError):
    """A setting is unusable: the process ends with exit code 78.

    Args:
        lines: one line per wrong setting; they hold no secret.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__(*lines)


class UnusableCommand(WorkerError):
    """A poison message: it can never succeed, however often it is tried.

    Args:
        message: the error, as text for people.
        details: the invalid fields.
        command_id: the id, if one could be read.
        imei: the device, if one could be read.
    """

    code: FailureCode

    def __init__(
        self,
        message: str,
        details: tuple[Detail, ...] = (),
        *,
        command_id: str | None = None,
        imei: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.command_id = command_id
        self.imei = imei


class InvalidMessage(UnusableCommand):
    """The body is not a JSON object: too large, not UTF-8, not JSON, or with a duplicate name."""

    code = "invalid_message"


class InvalidCommand(UnusableCommand):
    """The body is a JSON object, but a field breaks its rule."""

    code = "invalid_command"


class RefusedInDoubt(UnusableCommand):
    """Its sender is refused, but it may have been sent while it was not: nobody may be told that it was not sent."""

    code = "outcome_unknown"


class BrokerUnavailable(WorkerError):
    """RabbitMQ cannot be reached, or the connection was lost: back off and reconnect."""


class UserRefused(BrokerUnavailable):
    """The broker refused the connection: it does not accept the user name, the password or the vhost."""


class PublishingBlocked(BrokerUnavailable):
    """The broker takes no publications, because of a memory or disk alarm."""


class Unconfirmed(BrokerUnavailable):
    """The broker has not confirmed a publication: it may have stored it or not."""


class AnswersLost(BrokerUnavailable):
    """An order of an operator is in force, but no answer to it could be read."""


class ClosedByBroker(BrokerUnavailable):
    """The broker closed a channel or the connection and gave a reason.

    Args:
        code: reply code of the broker.
        text: what it refuses, in words for people.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class ChannelRefused(ClosedByBroker):
    """The broker closed a channel because of a request or a publication."""


class ConnectionRefused(ClosedByBroker):
    """The broker closed the connection."""


class PublicationHung(WorkerError):
    """The broker does not come to an end with the routing of a publication."""


class TopologyMismatch(WorkerError):
    """An exchange or queue exists with other arguments, or may not be declared: retrying cannot help."""


class TransportError(WorkerError):
    """An HTTP request got no complete response that can be read.

    Args:
        reason: the kind of error and its text, without the URL, the headers or any secret.
        may_have_been_sent: bytes of the request may have reached the platform.
    """

    def __init__(self, reason: str, *, may_have_been_sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.may_have_been_sent = may_have_been_sent


class TLSError(TransportError):
    """TLS with the platform or with a proxy could not be established, or failed later."""


class HistoryUnreadable(WorkerError):
    """A device's command history could not be read completely, so it decides nothing.

    Args:
        reason: why, as text for people.
        is_outage: the platform itself failed.
        is_refused: the credentials were refused, or the answer is not OneNET's. If that happens to several devices in
            a row, the cause is not the device.
        is_throttled: the platform received too many requests.
        is_rate_limited: the worker itself allowed no further read soon: by its rate limit, or because too many
            histories, or too long ones, are read at this moment.
        retry_after_s: delay in seconds that the platform asked for; 0 if it throttles without a delay.
    """

    def __init__(
        self,
        reason: str,
        *,
        is_outage: bool = False,
        is_refused: bool = False,
        is_throttled: bool = False,
        is_rate_limited: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.is_outage = is_outage
        self.is_refused = is_refused
        self.is_throttled = is_throttled
        self.is_rate_limited = is_rate_limited
        self.retry_after_s = retry_after_s


class PlatformUnusable(WorkerError):
    """OneNET cannot be reached, refuses the credentials, or gives an unexpected answer."""


class StoreError(WorkerError):
    """The idempotency store failed: nothing may be sent."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, or does not answer."""


class StoreRefused(StoreUnavailable):
    """The store answers, and refuses what the work needs: it is full, a replica, or its user may not do this.

    Args:
        message: its words.
        concerns_all: it refuses every command; otherwise the reason may be one command's keys.
    """

    def __init__(self, message: str, *, concerns_all: bool = True) -> None:
        super().__init__(message)
        self.concerns_all = concerns_all


class StoreUnusable(StoreRefused):
    """The store is of a kind that is not supported: waiting cannot help."""


class LeaseLost(StoreError):
    """The lease expired, and another worker has claimed the command since.

    Args:
        command_id: id of the command.
    """

    def __init__(self, command_id: str) -> None:
        super().__init__(f"the lease expired, and another worker has claimed {command_id}")


class UuidTaken(StoreError):
    """The uuid of an outcome belongs to another command: it is not recorded, and the command is in doubt.

    Args:
        command_id: id of the command with that outcome.
    """

    def __init__(self, command_id: str) -> None:
        super().__init__(f"OneNET answered {command_id} with a uuid that belongs to another command")
        self.command_id = command_id


class LocalServiceError(WorkerError):
    """A service for the demo or the tests was neither found nor started."""
