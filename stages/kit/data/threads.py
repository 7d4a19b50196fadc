"""`map` in threads: in order, and with only a few results ahead of the one that is due.

Threads suffice for images: decoding, resizing and arithmetic happen in native code that runs
without Python's lock, and nothing is pickled or copied between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ordered_map(
    function: Callable,
    items: Iterable,
    threads: int,
    *,
    ahead: int | None = None,
    setup: Callable[[], object] | None = None,
) -> Iterator:
    """function(item) for each item, in order.

    `threads`: how many work beside the caller; 0: the caller works itself. `ahead`: how many items
    may be begun before their result is due (None: 8 for each thread), which bounds the memory.
    `setup()` is called once in each thread. An error of `function` is raised where its result is
    due. Closing the iterator early stops the threads.
    """
    if threads < 1:
        yield from map(function, items)
        return
    ahead = 8 * threads if ahead is None else ahead
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images", initializer=setup)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
