"""`igpt pretrain`: train a model, and print what came of it. Its options: `igpt.training.options`."""

from __future__ import annotations

import signal

from igpt.console import Console, say
from igpt.training.options import PretrainOptions


def run_pretrain(options: PretrainOptions) -> int:
    """The command `igpt pretrain`: train, then print the losses.

    Returns:
        The exit code: 0, or 130 / 143 after SIGINT / SIGTERM (128 + signal, as shells count).
    """
    from igpt.model.inference import BITS
    from igpt.training.pretrain import pretrain

    result = pretrain(options)
    parts = [f"{result.run}: step {result.step} of {options.steps}"]
    losses = {"training": result.train_loss, "validation": result.val_loss, "histogram baseline": result.histogram_loss}
    for name, loss in losses.items():
        if loss is not None:
            parts.append(f"{name} {loss:.4f} nats = {loss * BITS:.4f} bits per pixel")
    if result.skipped:
        parts.append(f"{result.skipped} damaged images skipped")
    say(", ".join(parts))
    if result.stopped_by is None:
        return 0
    kept = "before the first step" if result.checkpoint is None else f"{result.checkpoint} is written, --resume goes on"
    Console(True).log(f"stopped by {signal.Signals(result.stopped_by).name}: {kept}")
    return 128 + result.stopped_by
