"""Work ahead of a reader: other threads make the next items while one is used; besides that one no more are in memory than threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(make: Callable[[Item], Result], items: Iterable[Item], threads: int = 2) -> Iterator[Result]:
    """What ``make`` gives for each item, in order; at most ``threads`` of them are made ahead."""
    left = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque(pool.submit(make, item) for item in islice(left, threads))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(make, item) for item in islice(left, 1))
            yield made
