"""What is paused by hand, by the orders that were given."""

from datetime import UTC, datetime

import pytest

from worker.core.pauses import DEFAULT_PRODUCT, Kind, Order, Pauses, read_order

NOW = datetime(2026, 11, 30, 8, 0, tzinfo=UTC)


def order(kind: Kind, scope: str | None = None, by: str = "alice") -> Order:
    return Order(id="1", kind=kind, scope=scope, by=by, at=NOW)


@pytest.mark.parametrize(
    ("orders", "paused"),
    [
        ([], set()),
        ([order("pause")], {None, "heating"}),
        ([order("pause", "heating")], {"heating"}),
        ([order("pause", DEFAULT_PRODUCT)], {None}),
        ([order("pause"), order("resume")], set()),
        ([order("pause", "heating"), order("resume")], set()),
        ([order("pause"), order("resume", "heating")], {None, "heating"}),
        ([order("pause", "heating"), order("pause", DEFAULT_PRODUCT), order("resume", "heating")], {None}),
        ([order("resume"), order("pause", "heating"), order("probe"), order("report"), order("mark")], {"heating"}),
        ([order("pause", "water")], set()),
    ],
)
def test_which_products_are_paused(orders: list[Order], paused: set[str | None]) -> None:
    pauses = Pauses.after(orders)
    assert {product for product in (None, "heating") if pauses.of(product) is not None} == paused


def test_a_second_pause_of_the_same_scope_replaces_the_first() -> None:
    pauses = Pauses.after([order("pause", by="alice"), order("pause", by="bob")])
    assert [each.by for each in pauses.orders] == ["bob"]


def test_a_pause_of_all_products_is_named_before_that_of_one() -> None:
    pauses = Pauses.after([order("pause", "heating", by="alice"), order("pause", by="bob")])
    assert (pauses.of("heating") or order("mark")).by == "bob"


def test_an_order_survives_its_way_through_a_message() -> None:
    sent = order("pause", "heating")
    assert read_order(sent.model_dump_json().encode()) == sent


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"id": "1", "kind": "explode", "at": "2026-11-30T08:00:00Z"}',
        b'{"id": "1", "kind": "pause", "at": "2026-11-30T08:00:00"}',
        b'{"id": "1", "kind": "pause", "at": "0001-01-01T00:00:00Z"}',
        b'{"id": "1", "kind": "pause", "at": "9999-12-31T23:59:59-23:59"}',
        b'{"id": "onenet.#", "kind": "pause", "at": "2026-11-30T08:00:00Z"}',
        b'{"id": "1", "kind": "pause", "at": "2026-11-30T08:00:00Z", "scope": 5}',
    ],
)
def test_what_is_no_order(body: bytes) -> None:
    assert read_order(body) is None


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert read_order(b'{"id": "1", "kind": "pause", "at": "2026-11-30T08:00:00Z", "until": "tomorrow"}') is not None
