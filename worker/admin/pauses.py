"""Pausing and resuming products by hand, and probing them at once: a service with plain results."""

import getpass
import shlex
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from worker.amqp.address import BrokerAddress
from worker.amqp.control_client import Answers, give_order
from worker.amqp.topology import Topology
from worker.core.pauses import Kind, Order, ProductState
from worker.core.validation import messages
from worker.errors import AnswersLost, Unconfirmed, WorkerError

_WHAT_IS_PAUSED = "onenet-worker check says what is paused"


@dataclass(frozen=True, slots=True)
class Operator:
    """Gives orders to the workers of one namespace.

    Attributes:
        broker: to connect to.
        topology: of the workers.
        by: who gives them, as the workers log it.
    """

    broker: BrokerAddress
    topology: Topology
    by: str

    def pause(self, scope: str | None, reason: str = "") -> Answers:
        """Have nothing sent, not even probes, until ``resume``; workers that start later know it too.

        Args:
            scope: a product's name; None: all products; ``DEFAULT_PRODUCT``: commands that name none.
            reason: why, for those who wonder.

        Raises:
            WorkerError: the broker did not take the order.
        """
        return self._give("pause", scope, reason)

    def resume(self, scope: str | None, reason: str = "") -> Answers:
        """End pauses by hand; what the workers have paused by themselves is probed at once.

        Args:
            scope: a product's name; None: all pauses, also those of single products; ``DEFAULT_PRODUCT``: commands
                that name none.
            reason: why, for those who wonder.

        Raises:
            WorkerError: the broker did not take the order, or all products are paused and one was named.
        """
        if scope is not None:
            self._refuse_if_all_are_paused("resumed")
        return self._give("resume", scope, reason)

    def probe(self, scope: str | None) -> Answers:
        """Have products that the workers have paused probed at once, with the next command.

        Raises:
            WorkerError: the broker did not take the order, or the products are paused by hand.
        """
        for order in self.state().pauses.orders:
            if order.scope is None or order.scope == scope:
                raise WorkerError(
                    f"{described(order.scope)} {'are' if order.scope is None else 'is'} paused by hand, by {order.by}, "
                    f"and nothing is probed: end that with {resume_command(order.scope)}"
                )
        return self._give("probe", scope, "")

    def state(self) -> Answers:
        """Return what is paused by hand, and how each worker is; changes nothing.

        Raises:
            WorkerError: the broker did not take the question.
        """
        return self._give("report", None, "")

    def _refuse_if_all_are_paused(self, past: str) -> None:
        order = next((each for each in self.state().pauses.orders if each.scope is None), None)
        if order is not None:
            raise WorkerError(
                f"all products are paused by hand, by {order.by}, so that none can be {past} alone: "
                "run onenet-worker resume without a product, then pause the others"
            )

    def _give(self, kind: Kind, scope: str | None, reason: str) -> Answers:
        try:
            order = Order(id=str(uuid4()), kind=kind, scope=scope, by=self.by, at=datetime.now(UTC), reason=reason)
        except ValidationError as exc:
            raise WorkerError(*(f"{name}: {fault}" for name, fault in messages(exc).items())) from None
        try:
            return give_order(self.broker, self.topology, order)
        except Unconfirmed as exc:
            raise WorkerError(f"{exc}: the order may be in force; {_WHAT_IS_PAUSED}") from exc
        except AnswersLost as exc:
            raise WorkerError(f"the order was given, but its answers were lost: {exc}; {_WHAT_IS_PAUSED}") from exc


def this_person() -> str:
    """Return who runs this process, as far as the system knows."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown user"
    return f"{user}@{socket.gethostname()}"


def resume_command(scope: str | None) -> str:
    """Return the command that ends a pause by hand, and no other pause unless it is that of all products."""
    if scope is None:
        return "onenet-worker resume"
    return f"onenet-worker resume --product {shlex.quote(scope)}" if scope else "onenet-worker resume --default-product"


def described(scope: str | None) -> str:
    """Return the products of an order in words."""
    if scope is None:
        return "all products"
    return f"product {scope}" if scope else "the default product"


def states_by_product(answers: Answers) -> dict[str | None, list[ProductState]]:
    """Return for each product what the workers say of it; None is the default one."""
    found: dict[str | None, list[ProductState]] = {}
    for report in answers.reports:
        for state in report.products:
            found.setdefault(state.product, []).append(state)
    return found


def answers_document(answers: Answers) -> dict[str, Any]:
    """Return what is paused by hand, and what the workers say of themselves, as a JSON object."""
    return {
        "paused_by_hand": [order.model_dump(mode="json") for order in answers.pauses.orders],
        "ended": [order.model_dump(mode="json") for order in answers.ended],
        "workers": [report.model_dump(mode="json") for report in answers.reports],
    }
