"""What a dead letter means for an operator, and what to do next. Pure."""

from dataclasses import dataclass

from worker.dead_letters.letter import BROKER, Listing

_BROKERS_REASONS = {
    "delivery_limit": "it was delivered 20 times, and each time a worker or its connection ended before it did",
    "rejected": "a worker could publish neither its reply nor its dead letter, or the message is too large",
    "expired": "its time limit in the queue passed: the sender set the property expiration",
    "maxlen": "the queue of commands was full",
}


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do with a dead letter.

    Args:
        meaning: what its reason means, as one sentence.
        is_replay_useful: whether a replay can succeed; it never sends a command twice.
        replay: when to replay it, or why not.
        commands: what to type, in this order.
    """

    meaning: str
    is_replay_useful: bool
    replay: str
    commands: tuple[str, ...]


def advise(listing: Listing, name: str, *, is_valid: bool) -> Advice:
    """Return the advice for a dead letter.

    Args:
        listing: of the dead letter.
        name: what commands call it by, such as its short digest.
        is_valid: whether its body is a valid command.
    """
    replay = f"onenet-worker dead-letters replay {name} --wait"
    discard = f"onenet-worker dead-letters discard {name}"
    sender = f"the upstream system {listing.source}" if listing.source else "its sender"
    kind, _, detail = listing.reason.partition(": ")
    if kind != BROKER and listing.cannot_succeed:
        meaning = _MEANINGS.get(kind, "It failed, and OneNET has not cached it.")
        why = f"no: its expired_time has passed. Let {sender} publish a new command if it is still wanted"
        return Advice(meaning, is_replay_useful=False, replay=why, commands=(discard,))
    match kind:
        case "invalid_message" | "invalid_command":
            why = f"no: it would fail in the same way. Tell {sender} what is wrong; it has the same error in its reply"
            return Advice(_MEANINGS[kind], is_replay_useful=False, replay=why, commands=(discard,))
        case "command_id_conflict":
            why = f"no: it would fail in the same way. Let {sender} publish it under a new command id"
            return Advice(_MEANINGS[kind], is_replay_useful=False, replay=why, commands=(discard,))
        case "expired":  # though not by this machine's clock
            why = f"no: it would fail in the same way. Let {sender} publish a new command"
            return Advice(_MEANINGS[kind], is_replay_useful=False, replay=why, commands=(discard,))
        case "unknown_product":
            product = f"the product {listing.product}" if listing.product else "default credentials"
            why = f"yes, once ONENET_PRODUCTS_FILE or the settings of the workers have {product}. {_HISTORY_FIRST}"
            return Advice(_MEANINGS[kind], is_replay_useful=True, replay=why, commands=(replay,))
        case "retries_exhausted":
            why = "yes, once the platform works: it is sent again under the same command id"
            return Advice(_MEANINGS[kind], is_replay_useful=True, replay=why, commands=(replay,))
        case "outcome_unknown":
            why = f"yes. {_HISTORY_FIRST}. Look at the device first: what it has done already needs no replay"
            look = (f"onenet-worker device {listing.imei}",) if listing.imei else ()
            return Advice(_MEANINGS[kind], is_replay_useful=True, replay=why, commands=(*look, replay))
        case "poison_message":
            why = f"yes, after the fix: look for worker_crashed in the workers' logs. {_HISTORY_FIRST}"
            return Advice(_MEANINGS[kind], is_replay_useful=True, replay=why, commands=(replay,))
        case "broker":
            told = _BROKERS_REASONS.get(detail, "no worker said why")
            meaning = f"The broker itself dead-lettered it, and its sender got no reply: {told}."
            if not is_valid:
                why = f"only so that its sender gets a reply: it is no valid command. Else tell {sender} what is wrong"
                return Advice(meaning, is_replay_useful=False, replay=why, commands=(replay, discard))
            why = f"yes. {_HISTORY_FIRST}. With WORKER_TENANTS=isolated a worker may refuse it: see docs/security.md"
            return Advice(meaning, is_replay_useful=True, replay=why, commands=(replay,))
        case _:
            meaning = "A worker of another version dead-lettered it: its documents say what this reason means."
            return Advice(meaning, is_replay_useful=True, replay=f"yes. {_HISTORY_FIRST}", commands=(replay,))


_HISTORY_FIRST = "The device's history is read first, and nothing is sent that is in it"
_MEANINGS = {
    "invalid_message": "The message is no JSON object, so that nothing could be sent.",
    "invalid_command": "A field of the command breaks its rule, so that nothing could be sent.",
    "command_id_conflict": "Its command id was used before, for a command with another content. Nothing was sent.",
    "expired": "It was not sent before its expired_time. OneNET has not cached it.",
    "unknown_product": "No credentials are configured for its product.",
    "retries_exhausted": "All attempts failed, and OneNET has not cached it.",
    "outcome_unknown": "An answer was lost, and the device's history could not decide: OneNET may or may not have "
    "cached it, and the device may or may not act.",
    "poison_message": "Each attempt crashed its worker: this is a fault of the worker, or its memory limit is too low.",
}
