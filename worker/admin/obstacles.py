"""What keeps commands from being sent at this moment, as far as it can be seen from outside of the workers."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from worker.admin.pauses import Operator, described, resume_command, states_by_product, this_person
from worker.admin.queues import count_queues_of
from worker.amqp.address import BrokerAddress
from worker.amqp.connection import ALARM, ALARM_REMEDY
from worker.amqp.control_client import Answers
from worker.amqp.topology import Topology
from worker.core.pauses import DEFAULT_PRODUCT, Pauses
from worker.errors import BrokerUnavailable, PublishingBlocked, WorkerError

Kind = Literal["paused_by_hand", "paused", "no_worker", "alarm", "store_unavailable"]


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason why commands are not sent.

    Attributes:
        kind: what it is.
        scope: whose commands: those of a product; None: all, ``DEFAULT_PRODUCT``: those that name no product.
        text: what it is, for people.
        remedy: what to do, for people.
    """

    kind: Kind
    scope: str | None
    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}"


def find_obstacles(
    broker: BrokerAddress, topology: Topology, products: Collection[str | None] | None = None
) -> list[Obstacle]:
    """Return why commands that are published now are not sent soon; empty: no reason is known.

    Args:
        broker: to connect to.
        topology: of the workers.
        products: those of the commands; None stands for the default product. Without any: all.

    Raises:
        BrokerUnavailable: no node can be reached, or the connection was lost.
    """
    try:
        answers = Operator(broker, topology, this_person()).state()
    except PublishingBlocked:
        return [_alarm()]
    except BrokerUnavailable:
        raise
    except WorkerError:  # no control stream, or no right to it: what remains can be said all the same
        answers = Answers(Pauses(), ())
    found = pauses_in(answers, products)
    # Workers that are paused as a whole consume nothing, and one may answer late.
    is_all_paused = any(order.scope is None for order in answers.pauses.orders)
    if not answers.reports and not is_all_paused and not count_queues_of(broker, topology).consumers:
        found.append(
            Obstacle(
                "no_worker",
                None,
                f"no worker consumes {topology.execute_queue}",
                "start one with onenet-worker run",
            )
        )
    return found + faults_in(answers)


def faults_in(answers: Answers) -> list[Obstacle]:
    """Return what keeps the workers that have answered from sending anything, and is nobody's order."""
    found = []
    if any(report.is_blocked for report in answers.reports):
        found.append(_alarm())
    if answers.reports and not any(report.is_store_available for report in answers.reports):
        text = "no worker can use the idempotency store"
        found.append(Obstacle("store_unavailable", None, text, "look for store_unavailable in their logs"))
    return found


def _alarm() -> Obstacle:
    return Obstacle("alarm", None, ALARM, ALARM_REMEDY)


def pauses_in(answers: Answers, products: Collection[str | None] | None = None) -> list[Obstacle]:
    """Return the pauses by hand, and what workers have paused by themselves.

    Args:
        answers: what is known of the workers.
        products: those of the commands; without any, all.
    """
    found = []
    for order in answers.pauses.orders:
        if products is None or any(order.concerns(product) for product in products):
            verb = "are" if order.scope is None else "is"
            why = f" ({order.reason})" if order.reason else ""
            text = f"{described(order.scope)} {verb} paused by hand, by {order.by}{why}"
            found.append(Obstacle("paused_by_hand", order.scope, text, f"{resume_command(order.scope)} ends it"))
    for product, states in states_by_product(answers).items():
        by_hand = [each for each in states if each.is_by_hand]
        if by_hand and answers.pauses.of(product) is None and (products is None or product in products):
            scope = product or DEFAULT_PRODUCT  # the workers know more of the stream than was read
            text = f"{described(scope)} is {by_hand[0].reason}"
            found.append(Obstacle("paused_by_hand", scope, text, f"{resume_command(scope)} ends it"))
        paused = [each for each in states if each.is_paused and not each.is_by_hand]
        if paused and (products is None or product in products):
            scope = product or DEFAULT_PRODUCT
            place = "" if len(paused) == len(states) else f" by {len(paused)} of {len(states)} workers"
            text = f"{described(scope)} is paused{place}, because of {paused[0].reason}"
            waits = [each.next_try_in_s for each in paused if each.next_try_in_s is not None]
            due = f"the next probe is in {min(waits):g} s; " if waits else ""
            found.append(Obstacle("paused", scope, text, f"{due}onenet-worker probe sends one now"))
    return found
