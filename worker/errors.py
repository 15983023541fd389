"""The errors of this worker, one tree, each named for what happened, and the exit codes that tell of them."""

from schemas.reply import Detail, FailureCode

EXIT_FAILURE = 1
EXIT_SOFTWARE = 70  # this one and the next as in sysexits.h
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130


class WorkerError(Exception):
    """Everything that the worker itself raises."""


class SettingsError(WorkerError):
    """A setting cannot be used: the start stops with exit code 78.

    Args:
        lines: one line per wrong setting, without any secret.
    """

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class UnusableCommand(WorkerError):
    """A poison message: it can never succeed, however often it is tried.

    Args:
        message: what is wrong, for a person.
        details: the fields at fault.
        command_id: the id, as far as one could be read.
        imei: the device, as far as one could be read.
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
    """The body is no JSON object: too large, not UTF-8, not JSON, or ambiguous."""

    code = "invalid_message"


class InvalidCommand(UnusableCommand):
    """A JSON object, but a field breaks its rule."""

    code = "invalid_command"


class BrokerUnavailable(WorkerError):
    """RabbitMQ cannot be reached, or the connection to it was lost: back off and connect again."""


class ClosedByBroker(BrokerUnavailable):
    """The broker closed a channel or the connection, and said why.

    Args:
        code: the broker's reply code.
        text: its words.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code


class ChannelRefused(ClosedByBroker):
    """The broker closed a channel over something that it was asked."""


class ConnectionRefused(ClosedByBroker):
    """The broker closed the connection."""


class TopologyMismatch(WorkerError):
    """An exchange or queue exists with other arguments, or may not be declared: trying again would not mend it."""


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
    """A device's command history could not be read whole, so that it decides nothing.

    Args:
        reason: why.
        is_outage: the platform itself failed.
        is_refused: the credentials were refused, or the answer is not OneNET's; for several devices in a row that is
            no matter of one device.
        is_throttled: the platform gets too many requests; it should not be asked again at once.
        retry_after_s: the wait in seconds that it asked for; 0 where it is throttled and did not say for how long.
    """

    def __init__(
        self,
        reason: str,
        *,
        is_outage: bool = False,
        is_refused: bool = False,
        is_throttled: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.is_outage = is_outage
        self.is_refused = is_refused
        self.is_throttled = is_throttled
        self.retry_after_s = retry_after_s


class PlatformUnusable(WorkerError):
    """OneNET cannot be reached, refuses the credentials, or does not answer as it should."""


class StoreError(WorkerError):
    """The idempotency store did not do what it was asked: nothing may be sent."""


class StoreUnavailable(StoreError):
    """It cannot be reached, or does not answer."""


class LeaseLost(StoreError):
    """The lease ended, and somebody else has claimed the command since.

    Args:
        command_id: which.
    """

    def __init__(self, command_id: str) -> None:
        super().__init__(f"another worker has claimed {command_id} since")


class UuidTaken(StoreError):
    """The uuid of an outcome belongs to another command: the outcome is not recorded, and the command is in doubt.

    Args:
        command_id: whose outcome it was.
    """

    def __init__(self, command_id: str) -> None:
        super().__init__(f"the uuid that {command_id} was answered with belongs to another command")
        self.command_id = command_id


class LocalServiceError(WorkerError):
    """A service for the demo or the tests could neither be found nor started."""
