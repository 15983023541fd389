"""What operators order of all workers: pause, resume, probe; and which products are paused by hand. Pure.

Pauses and their ends are messages of a stream that every worker reads from its beginning, so that one which starts
later knows them too; a probe or a question is only for workers that run. Versions of the worker may differ: of an order
only what is known is read.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from worker.core.command import MAX_PRODUCT_CHARS

Kind = Literal["pause", "resume", "probe", "report", "mark"]
DEFAULT_PRODUCT = ""  # in an order: commands that name no product
_YEARS = range(2000, 9999)  # later conversions to other zones cannot overflow


def _is_of_our_time(moment: datetime) -> datetime:
    if moment.year not in _YEARS:
        raise ValueError("must be a year from 2000 to 9998")
    return moment.astimezone(UTC)


Moment = Annotated[AwareDatetime, AfterValidator(_is_of_our_time)]


class Order(BaseModel):
    """One order to all workers.

    Attributes:
        id: of the order; reports that answer it have it in their routing key.
        kind: ``pause`` and ``resume`` change what is sent; ``probe`` has paused products probed at once; ``report``
            only asks for reports; ``mark`` means nothing, and only makes the end of the stream known.
        scope: the product; None for all products, ``DEFAULT_PRODUCT`` for commands that name none.
        by: who ordered it.
        at: when.
        reason: why, in the words of the one who ordered it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(pattern=r"^[A-Za-z0-9-]{1,64}$")
    kind: Kind
    scope: Annotated[str, Field(max_length=MAX_PRODUCT_CHARS)] | None = None
    by: str = Field("", max_length=300)
    at: Moment
    reason: str = Field("", max_length=500)

    @property
    def is_lasting(self) -> bool:
        """Whether workers that start later have to know it."""
        return self.kind in {"pause", "resume", "mark"}

    def concerns(self, product: str | None) -> bool:
        """Tell whether it is about a product; None is the default one."""
        return self.scope is None or self.scope == (product or DEFAULT_PRODUCT)


class ProductState(BaseModel):
    """Whether one worker sends commands of a product.

    Attributes:
        product: None for the default one.
        is_paused: nothing is sent but probes.
        is_by_hand: it was ordered: there are no probes either.
        reason: why it is paused.
        next_try_in_s: seconds until the next probe may be sent; None where nothing is due.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    product: str | None
    is_paused: bool
    is_by_hand: bool = False
    reason: str = ""
    next_try_in_s: float | None = None


class WorkerReport(BaseModel):
    """What one worker says of itself.

    Attributes:
        worker: its name, host and process id.
        version: of the program.
        is_blocked: the broker takes no publications of it: a memory or disk alarm.
        is_store_available: the idempotency store can be used.
        products: the state of each product that it has credentials for.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    worker: str
    version: str
    is_blocked: bool
    is_store_available: bool
    products: tuple[ProductState, ...]


def read_order(body: bytes) -> Order | None:
    """Return the order in a message; None: it is none, or one of a kind that this version does not know."""
    try:
        return Order.model_validate_json(body)
    except ValidationError:
        return None


def read_report(body: bytes) -> WorkerReport | None:
    """Return the report in a message; None: it is none."""
    try:
        return WorkerReport.model_validate_json(body)
    except ValidationError:
        return None


@dataclass(frozen=True, slots=True)
class Pauses:
    """The pauses by hand that are in force: the order that began each."""

    orders: tuple[Order, ...] = ()

    @classmethod
    def after(cls, orders: Iterable[Order]) -> Self:
        """Return what is paused after orders in the sequence in which they were given."""
        pauses = cls()
        for order in orders:
            pauses = pauses.changed(order)
        return pauses

    def changed(self, order: Order) -> Self:
        """Return what is paused after one more order.

        The end of a pause of all products ends those of single ones too; a second pause of the same scope replaces the
        first.
        """
        match order:
            case Order(kind="pause"):
                return type(self)((*(each for each in self.orders if each.scope != order.scope), order))
            case Order(kind="resume", scope=None):
                return type(self)()
            case Order(kind="resume"):
                return type(self)(tuple(each for each in self.orders if each.scope != order.scope))
            case _:
                return self

    def of(self, product: str | None) -> Order | None:
        """Return the order by which a product is paused, that of all products first; None if it is not paused."""
        found = [each for each in self.orders if each.concerns(product)]
        return min(found, key=lambda each: each.scope is not None, default=None)
