"""What the broker says when it refuses something, in words for people: with neither its user nor its vhost.

Both are parts of the broker's URL, of which only host and port are ever shown: where a password holds a special
character that is not escaped, a part of it may be taken for the user or for the vhost.
"""

import re
from collections.abc import Callable

_VHOST_AND_USER = r" in vhost '.*' refused for user '.*'.*"
_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (
        re.compile(rf"(?:(\w+) )?access to topic '(.*)' in exchange '(.*?)'{_VHOST_AND_USER}"),
        lambda found: (
            f"this user has no right to {found[1] or 'use'} the routing key {found[2]} of exchange {found[3]}"
        ),
    ),
    (
        re.compile(rf"(?:(\w+) )?access to (exchange|queue) '(.*?)'{_VHOST_AND_USER}"),
        lambda found: f"this user has no right to {found[1] or 'use'} the {found[2]} {_named(found[3])}",
    ),
    (
        re.compile(
            r"inequivalent arg '(.*?)' for (queue|exchange) '(.*?)' in vhost '.*': received (.*) but current is (.*)"
        ),
        lambda found: (
            f"the {found[2]} {found[3]} exists with another {found[1]}: {_value(found[5])}, and not "
            f'{_value(found[4])}: see "Upgrades" in docs/operations.md'
        ),
    ),
    (
        re.compile(r"no (queue|exchange) '(.*?)' in vhost '.*'"),
        lambda found: f"the {found[1]} {found[2]} does not exist",
    ),
    (
        re.compile(r"cannot obtain exclusive access to locked queue '(.*?)' in vhost .*"),
        lambda found: f"another connection holds the queue {found[1]} for itself",
    ),
    (
        re.compile(r"(?:.*: )?(?:user )?connection limit.*|.*connection limit \(\d+\) is reached.*"),
        lambda _: "the broker's limit of connections is reached",
    ),
    (re.compile(r".*vhost '.*' is down.*"), lambda _: "the vhost of AMQP_URL is down on this node"),
    (
        re.compile(r"access to vhost '.*' refused for user '.*'.*"),
        lambda _: "this user has no permissions in the vhost of AMQP_URL",
    ),
    (
        re.compile(r"stream queue '(.*?)' in vhost '.*' does not have a running replica on the local node"),
        lambda found: f"the stream {found[1]} has no replica on this node",
    ),
    (re.compile(r"vhost .* not found"), lambda _: "the vhost of AMQP_URL does not exist"),
)
_INTERNAL_ERROR = 541
_TEXT = re.compile(r"(?P<name>[A-Z_]+) - (?P<words>.*)", re.DOTALL)
_VALUE = re.compile(r"(?:the value )?'(.*?)'(?: of type '.*')?")
_SECRET = re.compile(r"\s*(?:\b(?:in|to|for)\s+)?\b(?:vhost|user)\b(?: was)? ?\\?'.*", re.DOTALL)


def refusal(code: int, text: str) -> str:
    """Return in one line what the broker refuses, with the code and its name at the end.

    Args:
        code: reply code of the broker.
        text: reply text of the broker.
    """
    found = _TEXT.fullmatch(text)
    name, words = (found["name"], found["words"]) if found else ("", text)
    words = " ".join(words.split())
    for form, rewritten in _FORMS:
        if match := form.fullmatch(words):
            return f"{rewritten(match)} ({code} {name})"
    if code == _INTERNAL_ERROR:  # which quotes the broker's own data
        return f"the broker has an error of its own ({code} {name})"
    shown = _SECRET.sub("", words) or "nothing"  # from there on: where a name ends that holds a quote nobody can tell
    return f"the broker says: {shown} ({code} {name})".replace(" )", ")")


def _named(queue: str) -> str:
    """Return the name of a queue for people, who may not know one that the broker has made up."""
    if not queue.startswith("amq.gen-"):
        return queue
    return r"amq.gen-*, a queue of its own: it needs configure, write and read on ^amq\.gen, as in docs/security.md"


def _value(words: str) -> str:
    found = _VALUE.fullmatch(words)
    return found[1] if found else words
