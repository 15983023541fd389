"""What holds between upstream systems that do not trust each other: ``WORKER_TENANTS=isolated``. Pure.

RabbitMQ lets nobody set the property ``user_id`` to another user's name, but anybody may set ``app_id`` and
``reply_to``. Source: https://www.rabbitmq.com/docs/validated-user-id
"""

from schemas.reply import Detail
from worker.core.envelope import Envelope

_RESERVED = frozenset({"execute", "result", "unknown"})  # the routing keys of all systems begin or end with these
# The broker tries each way in which a binding with several # may match a routing key: for a hundred words, minutes
# (measured on RabbitMQ 3.10), in which it confirms nothing else.
_MAX_WORDS = 10


def violations(envelope: Envelope) -> list[Detail]:
    """Return what a message claims to be without being allowed to; none: its sender is who it says."""
    if envelope.user_id is None or envelope.user_id in _RESERVED:
        return [_detail("user_id", "must be set to the user who publishes, and not be execute, result or unknown")]
    if envelope.app_id != envelope.user_id:
        return [_detail("app_id", "must be the same as the AMQP property user_id")]
    if not _is_own_address(envelope):
        rule = f"must be the app_id, or begin with it and a dot, and have at most {_MAX_WORDS} words"
        return [_detail("reply_to", rule)]
    return []


def was_never_sent(envelope: Envelope) -> bool:
    """Tell, from the message alone, whether its command was never sent while its sender was not yet refused."""
    return not (envelope.may_have_been_sent or envelope.may_have_twin)


def own_reply_to(envelope: Envelope) -> str | None:
    """Return the routing key that a message asks for, if it is its sender's."""
    return None if violations(envelope) else envelope.reply_to


def _is_own_address(envelope: Envelope) -> bool:
    address, app_id = envelope.reply_to, envelope.app_id
    if address is None or address == app_id:
        return True
    return address.startswith(f"{app_id}.") and len(address.split(".")) <= _MAX_WORDS


def _detail(name: str, message: str) -> Detail:
    return Detail(field=name, message=f"the AMQP property {name} {message}")
