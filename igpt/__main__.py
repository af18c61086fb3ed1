"""The program `igpt`, also as ``python -m igpt``. Its own imports are few, so that an interrupt finds it ready."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once and quietly: there is nothing to undo."""
    os.write(2, b"igpt: interrupted\n")
    os._exit(INTERRUPTED)


def run() -> int:
    """Run `igpt.commands.main.main`; SIGINT while it is imported or after its end gives code 130 without a traceback."""
    wanted = signal.getsignal(signal.SIGINT)
    if wanted == signal.SIG_IGN:  # a shell's background job
        from igpt.commands.main import main

        return main()
    signal.signal(signal.SIGINT, _leave)
    from igpt.commands.main import main

    try:
        signal.signal(signal.SIGINT, wanted)
        return main()
    except KeyboardInterrupt:  # outside the part of `main` that catches it
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, _leave)


if __name__ == "__main__":
    sys.exit(run())
