"""From the settings of a run to its result: device, run folder, lock, signals, and the loop.

Stop a run with SIGINT or SIGTERM and go on with ``resume=True``: bit for bit as if it had not been stopped.
"""

from __future__ import annotations

import torch

from igpt.console import Console
from igpt.machine import pick_device, reproducible
from igpt.training.loop import Trainer, TrainResult
from igpt.training.options import PretrainOptions
from igpt.training.run_folder import RunLock, continued, holds_run, read_config
from igpt.training.signals import Signals, Stopped


def pretrain(options: PretrainOptions, *, progress: bool = True) -> TrainResult:
    """Train a model, or go on training one, and keep everything about it in the folder ``options.out``.

    Each step: the images of (seed, step) -> loss in nats per pixel; in `accumulate` parts whose gradients add up to that of
    the whole batch; -> stop if it or the gradient is not finite -> clip -> AdamW at `learning_rate` of the step. SIGTERM and
    SIGINT (in the main thread) end the run after the step under way, with a checkpoint; a second one kills as usual.

    Args:
        options: all settings; see `igpt.training.options.PretrainOptions`.
        progress: report on stderr: a few lines at the start and at each validation, and a bar on a terminal.

    Returns:
        Losses and places; ``stopped_by`` says whether a signal ended it early.

    Raises:
        ConfigError: settings that cannot be, a folder that is in use or holds another run, a resume with other settings.
        DataError: images that cannot be read.
        CheckpointError: nothing whole to resume from, or a checkpoint or metrics that cannot be written. What was there
            stays.
        NonFiniteError: loss or gradient norm is NaN or infinite. The weights were not updated; what is known about the
            step is in ``nonfinite-step-N.json``.
    """
    device = pick_device(options.device)
    with RunLock(options.out) as lock, Signals() as signals:
        saved = read_config(options.out) if holds_run(options.out, options.resume) else None
        notes: list[str] = []
        if saved is not None:
            options, notes = continued(options, saved)
        console = Console(progress)
        for note in notes:
            console.log(f"resume: {note}")
        cuda = [device] if device.type == "cuda" else []
        with reproducible(options.deterministic), torch.random.fork_rng(devices=cuda):
            torch.manual_seed(options.seed)
            try:
                with signals.may_raise():
                    trainer = Trainer(options, device, signals, console, lock.place, begun=saved is not None)
            except Stopped:
                return TrainResult(run=options.out, stopped_by=signals.received)
            return trainer.train()
