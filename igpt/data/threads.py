"""Threads and a lock that belong to one process: whoever has them can be forked, pickled and copied."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor


class Threads:
    """A pool of threads and a lock. Both are made when first asked for, and anew in each process.

    A forked process has none of its parent's threads, and a lock that one of them held would never be free. What a pickle or a
    copy holds is the two settings.

    Args:
        count: threads.
        name: how their names begin.
    """

    def __init__(self, count: int, name: str) -> None:
        self._settings = count, name
        self._process = os.getpid()
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return Threads, self._settings

    @property
    def is_inherited(self) -> bool:
        """Whether this is a fork's copy that no longer has its threads; the next use makes them."""
        return self._process != os.getpid()

    def _own(self) -> None:
        if self.is_inherited:
            self._lock, self._making, self._pool = threading.Lock(), threading.Lock(), None
            self._process = os.getpid()

    @property
    def lock(self) -> threading.Lock:
        """The lock of this process."""
        self._own()
        return self._lock

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The pool of this process."""
        self._own()
        with self._making:
            if self._pool is None:
                count, name = self._settings
                self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
            return self._pool

    def close(self) -> None:
        """Wait for the threads and end them. The next use starts them again."""
        self._own()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
