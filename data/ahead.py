"""Making the next item while the present one is used."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """``items`` in their order, each made by a thread while the caller works on the one before it.

    Nothing is made before the first is asked for. What making an item raises is raised where that item is asked for.
    The thread ends, after the item that it is at, when this iterator is exhausted, closed or forgotten.
    """
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item
