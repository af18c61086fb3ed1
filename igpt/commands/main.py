"""The command line: ``igpt COMMAND ...``. Each command has its options in its own module; work is imported when it begins."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Annotated, Any, Union

import tyro

from igpt import __version__
from igpt.commands.bench import BenchOptions
from igpt.commands.complete import CompleteOptions
from igpt.commands.demo import DemoOptions
from igpt.commands.info import InfoOptions
from igpt.commands.layouts import LayoutsOptions
from igpt.commands.palette import PaletteOptions
from igpt.commands.probe import ProbeOptions
from igpt.commands.sample import SampleOptions
from igpt.commands.tokenize import TokenizeOptions
from igpt.console import one_line
from igpt.data.sources import help_text
from igpt.errors import ConfigError, IgptError
from igpt.files import describe, reason
from igpt.training.options import PretrainOptions
from igpt_kernels.layouts import FORMS

DEBUG = "IGPT_DEBUG"
"""An environment variable: where it is set, an error keeps its traceback."""


@dataclass(frozen=True)
class Command:
    """One command: ``run_NAME`` of ``igpt.commands.NAME``.

    Attributes:
        options: its options.
        words: names of options whose values may stand first, without their name.
        help: one line.
    """

    options: type[Any]
    words: tuple[str, ...]
    help: str


COMMANDS = {
    "demo": Command(DemoOptions, (), "Pretrain on real digits, sample, complete, probe: one page."),
    "palette": Command(PaletteOptions, ("source",), "igpt palette SOURCE: learn a colour palette."),
    "tokenize": Command(TokenizeOptions, ("source",), "igpt tokenize SOURCE: images to tokens.npy."),
    "pretrain": Command(PretrainOptions, ("source",), "igpt pretrain SOURCE: train a model."),
    "sample": Command(SampleOptions, ("model",), "igpt sample MODEL: draw new images."),
    "complete": Command(
        CompleteOptions, ("model", "source"), "igpt complete MODEL SOURCE: keep a part of real images, draw the rest."
    ),
    "probe": Command(ProbeOptions, ("model", "source"), "igpt probe MODEL SOURCE: how well does each layer classify?"),
    "layouts": Command(LayoutsOptions, ("pattern",), "igpt layouts PATTERN: draw a sparse attention pattern."),
    "bench": Command(BenchOptions, (), "python -m benchmarks in a source tree; igpt bench --help."),
    "info": Command(InfoOptions, (), "Versions, devices, the compiled extension, chosen kernels."),
}


def _spell_out(arguments: list[str]) -> list[str]:
    """``pretrain digits --out x`` -> ``pretrain --source digits --out x``."""
    if not arguments or arguments[0] not in COMMANDS:
        return arguments
    command, rest = arguments[0], arguments[1:]
    named = []
    for name in COMMANDS[command].words:
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{name}", rest.pop(0)]
    return [command, *named, *rest]


def _one_line(text: str) -> str:
    """Tyro's boxed error as one line: what stands inside the box, before its first rule, without the name of a class.

    Where a terminal has no box characters, a title and a rule of hyphens stand above.
    """
    lines = [line.strip("│ ").strip() for line in text.splitlines() if line.startswith("│")]
    if not lines:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = lines[2:] if len(lines) > 2 and set(lines[1]) == {"-"} else lines
    until_rule = list(itertools.takewhile(lambda line: not line.startswith(("─", "---")), lines))
    return re.sub(r"^Error parsing \w+: ", "", " ".join(until_rule) or " ".join(text.split()))


def _description(command: Command, *, whole: bool) -> str:
    """The line of a command; in its own help also the data sources or the forms of patterns, where it takes one."""
    more = {"source": help_text(), "pattern": f"Patterns: {FORMS}."}
    return " ".join([command.help, *(text for word, text in more.items() if whole and word in command.words)])


def _parse(arguments: list[str]) -> tuple[str, Any]:
    if arguments[:1] == ["bench"]:  # its options are those of `python -m benchmarks`, which reads them itself
        return "bench", BenchOptions(tuple(arguments[1:]))
    arguments = _spell_out(arguments)
    asked = arguments[0] if arguments else ""
    choices = tuple(
        Annotated[
            each.options,
            tyro.conf.subcommand(name=name, description=_description(each, whole=name == asked), prefix_name=False),
        ]
        for name, each in COMMANDS.items()
    )
    kind: Any = Union[choices]  # noqa: UP007 - built at run time
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options = tyro.cli(
                kind,
                prog="igpt",
                args=arguments,
                description="Image GPT: palettes, pretraining, sampling, completion and linear probes.",
                config=(tyro.conf.OmitSubcommandPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        help_of = f"igpt {arguments[0]}" if arguments and arguments[0] in COMMANDS else "igpt"
        raise ConfigError(f"{_one_line(complaint.getvalue())} ({help_of} --help lists what there is)") from None
    command = next(name for name, entry in COMMANDS.items() if isinstance(options, entry.options))
    return command, options


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether numpy, the CPU's or a GPU's allocator refused. Torch's classes are known by name: loading it takes seconds."""
    refused = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return refused or "can't allocate memory" in str(error)


class _Interrupts:
    """Context manager: SIGINT raises `KeyboardInterrupt`, and is remembered.

    An import of compiled modules (torch, numpy) can turn that exception into another one.
    """

    def __init__(self) -> None:
        self.seen = False
        self._ours = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Interrupts:
        self._ours = self._ours and signal.getsignal(signal.SIGINT) == signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


def _complaint(error: BaseException, *, interrupted: bool) -> tuple[str, int]:
    """What to say about an error, and the exit code: 130 interrupted, 2 what a user can mend, 1 a fault of this program."""
    if interrupted or isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, IgptError):
        return str(error), 2
    if isinstance(error, OSError):
        named = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*named, reason(error) or describe(error)]), 2
    if _is_out_of_memory(error):
        return f"out of memory: {describe(error)}; smaller sizes or batches take less", 2
    return f"a fault of igpt: {describe(error)}; {DEBUG}=1 shows where", 1


def _prepare_streams() -> None:
    """Output that always works: letters that the encoding lacks are spelled out; a closed stream takes what comes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _silence_stdout() -> None:
    """What is left to be written cannot be; the flush at exit would say so once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"igpt: warning: {one_line(str(message))}\n"


def _run(arguments: list[str]) -> int:
    """Parse and run a command; its exit code."""
    if arguments == ["--version"]:
        print(f"igpt {__version__}")
        return 0
    command, options = _parse(arguments)
    module = importlib.import_module(f"igpt.commands.{command}")
    result = getattr(module, f"run_{command}")(options)
    return result if isinstance(result, int) else 0


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or after one line on stderr 2 (a user's mistake, too little memory), 130 or 1 (a fault)."""
    # GNU OpenMP reads this when torch is loaded. By default its threads spin for long while they wait for one another: on 2
    # cores beside one other busy process a training step of the demo then takes 1.2 to 2.3 s. Asleep at once ("passive") it
    # takes 0.2 s there, but 0.18 s instead of 0.11 s on an idle machine; after a short spin 0.14 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    given = sys.argv[1:] if arguments is None else arguments
    _prepare_streams()
    before, warnings.formatwarning = warnings.formatwarning, _format_warning
    interrupts = _Interrupts()
    try:
        with interrupts:
            result = _run(given)
            sys.stdout.flush()
        return result
    except BrokenPipeError:  # the reader (head, less) closed the pipe
        _silence_stdout()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get(DEBUG) and not isinstance(error, IgptError):
            raise
        text, code = _complaint(error, interrupted=interrupts.seen)
        if isinstance(error, OSError):
            _silence_stdout()
        print(f"igpt: {one_line(text)}", file=sys.stderr)
        return code
    finally:
        warnings.formatwarning = before


if __name__ == "__main__":
    sys.exit(main())
