"""Signals that end a run: the first asks it to stop, a second one kills as usual."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any


class Stopped(BaseException):
    """A signal asked the run to end, inside `Signals.may_raise`. No `Exception`: decoders catch those of damaged images."""


class Signals:
    """Context manager: the first SIGINT or SIGTERM sets `received` instead of killing; a second one does what it did before.

    Handlers are installed in the main thread only (Python allows no other). An ignored signal stays ignored. They are put back
    on exit.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._raise = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def may_raise(self) -> Iterator[None]:
        """Inside, a signal raises `Stopped` at once: for work that can take minutes and changes nothing, such as sampling."""
        if self.received is not None:
            raise Stopped
        self._raise = True
        try:
            yield
        finally:
            self._raise = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self.__exit__(None, None, None)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if self._raise:
            raise Stopped
