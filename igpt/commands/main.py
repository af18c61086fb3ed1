"""The command line: ``igpt COMMAND ...``. Each command has its options in its own module; work is imported when it begins."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import re
import sys
from dataclasses import dataclass
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
from igpt.data.sources import help_text
from igpt.errors import ConfigError, IgptError
from igpt.files import describe
from igpt.training.options import PretrainOptions
from igpt_kernels.layouts import FORMS


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


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after printing one line about a user's mistake or too little memory."""
    # GNU OpenMP reads this when torch is loaded. By default its threads spin for long while they wait for one another: on 2
    # cores beside one other busy process a training step of the demo then takes 1.2 to 2.3 s. Asleep at once ("passive") it
    # takes 0.2 s there, but 0.18 s instead of 0.11 s on an idle machine; after a short spin 0.14 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        print(f"igpt {__version__}")
        return 0
    try:
        command, options = _parse(given)
        module = importlib.import_module(f"igpt.commands.{command}")
        result = getattr(module, f"run_{command}")(options)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader (head, less) closed the pipe; silence the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (IgptError, OSError) as error:
        print(f"igpt: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(f"igpt: out of memory: {describe(error)}; smaller sizes or batches take less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("igpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
