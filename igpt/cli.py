"""The command line: ``igpt COMMAND ...``. Options are the dataclasses of `igpt.config`; work is imported when it begins."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import sys
from typing import Annotated, Any, Union

import tyro

from igpt import config
from igpt.errors import ConfigError, IgptError

# command: options, where its work is done, leading words that may stand without their option name, one line of help
COMMANDS: dict[str, tuple[type[Any], str, tuple[str, ...], str]] = {
    "demo": (config.DemoOptions, "igpt.demo:run_demo", (), "Pretrain on real digits, sample, complete, probe: one page."),
    "palette": (config.PaletteOptions, "igpt.palette:run_palette", ("source",), "igpt palette SOURCE: learn a colour palette."),
    "tokenize": (config.TokenizeOptions, "igpt.data:run_tokenize", ("source",), "igpt tokenize SOURCE: images to tokens.npy."),
    "pretrain": (config.PretrainOptions, "igpt.train:run_pretrain", ("source",), "igpt pretrain SOURCE: train a model."),
    "sample": (config.SampleOptions, "igpt.sampling:run_sample", ("model",), "igpt sample MODEL: draw new images."),
    "complete": (
        config.CompleteOptions,
        "igpt.sampling:run_complete",
        ("model", "source"),
        "igpt complete MODEL SOURCE: keep a part of real images, draw the rest.",
    ),
    "probe": (
        config.ProbeOptions,
        "igpt.probe:run_probe",
        ("model", "source"),
        "igpt probe MODEL SOURCE: how well does each layer classify?",
    ),
    "layouts": (
        config.LayoutsOptions,
        "igpt.patterns:run_layouts",
        ("pattern",),
        "igpt layouts PATTERN: draw a sparse attention pattern.",
    ),
    "bench": (config.BenchOptions, "igpt.bench:run_bench", (), "python -m benchmarks in a source tree; igpt bench --help."),
    "info": (config.InfoOptions, "igpt.info:run_info", (), "Versions, devices, the compiled extension, chosen kernels."),
}


def _spell_out(arguments: list[str]) -> list[str]:
    """``pretrain digits --out x`` -> ``pretrain --source digits --out x``."""
    if not arguments or arguments[0] not in COMMANDS:
        return arguments
    command, rest = arguments[0], arguments[1:]
    named = []
    for name in COMMANDS[command][2]:
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{name}", rest.pop(0)]
    return [command, *named, *rest]


def _one_line(text: str) -> str:
    """Tyro's boxed error as one line: what stands inside the box, before its first rule."""
    inside = [line.strip("│ ").strip() for line in text.splitlines() if line.startswith("│")]
    until_rule = list(itertools.takewhile(lambda line: not line.startswith("─"), inside))
    return " ".join(until_rule) or " ".join(text.split())


def _parse(arguments: list[str]) -> tuple[str, Any]:
    if arguments[:1] == ["bench"]:  # its options are those of `python -m benchmarks`, which reads them itself
        return "bench", config.BenchOptions(tuple(arguments[1:]))
    arguments = _spell_out(arguments)
    choices = tuple(
        Annotated[options, tyro.conf.subcommand(name=name, description=text, prefix_name=False)]
        for name, (options, _, _, text) in COMMANDS.items()
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
    command = next(name for name, entry in COMMANDS.items() if isinstance(options, entry[0]))
    return command, options


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after printing one line about a user's mistake."""
    # GNU OpenMP reads this when torch is loaded. By default its threads spin for long while they wait for one another: on 2
    # cores beside one other busy process a training step of the demo then takes 1.2 to 2.3 s. Asleep at once ("passive") it
    # takes 0.2 s there, but 0.18 s instead of 0.11 s on an idle machine; after a short spin 0.14 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        command, options = _parse(sys.argv[1:] if arguments is None else arguments)
        module, _, function = COMMANDS[command][1].partition(":")
        result = getattr(importlib.import_module(module), function)(options)
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: nothing more to say, and not to the closed pipe at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (IgptError, OSError) as error:
        print(f"igpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("igpt: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
