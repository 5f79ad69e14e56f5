"""Items made ahead of their use: the same, in order, by one thread that ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from data.ahead import ahead

SECONDS = 20


def numbers(made: list[int], until: int, last: BaseException | None = None) -> Iterator[int]:
    for k in range(until):
        made.append(k)
        yield k
    if last is not None:
        raise last


def test_all_items_come_in_order_and_nothing_is_made_before_the_first_is_asked_for() -> None:
    made: list[int] = []
    items = ahead(numbers(made, 5))
    assert made == []
    assert list(items) == [0, 1, 2, 3, 4]
    assert list(ahead(numbers(made, 0))) == []


def test_one_item_is_made_while_another_is_used() -> None:
    entered, use_is_over = threading.Event(), threading.Event()

    def source() -> Iterator[str]:
        yield "first"
        entered.set()
        assert use_is_over.wait(SECONDS)
        yield threading.current_thread().name

    items = ahead(source())
    assert next(items) == "first"
    assert entered.wait(SECONDS)
    use_is_over.set()
    assert next(items) != threading.current_thread().name


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    items = ahead(numbers([], 2, KeyError("the third")))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(KeyError, match="the third"):
        next(items)


def test_its_thread_ends_when_it_is_closed_or_forgotten() -> None:
    before = set(threading.enumerate())
    for close in (True, False):
        items = ahead(numbers([], 1000))
        next(items)
        assert len(set(threading.enumerate()) - before) == 1
        if close:
            items.close()
        del items
        assert set(threading.enumerate()) == before
