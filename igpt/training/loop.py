"""The loop of a run: steps, validations, sample grids, checkpoints.

There is no random state to save: images of a step, masked pixels of the bert objective and crops of pictures are pure
functions of (seed, step). Weights are drawn once. So a run that was killed and resumed equals one that was
not. Bit for bit, on one machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from igpt.console import Console
from igpt.errors import CheckpointError, ConfigError, NonFiniteError
from igpt.files import reason, write_durably
from igpt.machine import available_memory, check_memory, versions
from igpt.model.config import ImageGPTConfig, preset
from igpt.model.inference import BITS
from igpt.plots import grids
from igpt.training import memory
from igpt.training.checkpoint import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune,
    remove_leftovers,
    save_checkpoint,
)
from igpt.training.data import TrainingData
from igpt.training.objectives import Purpose, draw_mask, losses
from igpt.training.optim import learning_rate, make_optimizer
from igpt.training.options import PretrainOptions
from igpt.training.run_folder import SAMPLES, Metrics, Place, write_config
from igpt.training.signals import Signals, Stopped

SAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run. Losses are nats per pixel; None where there was nothing to measure.

    Attributes:
        run: its folder.
        step: total optimizer steps, including before a resume.
        train_loss: mean over the steps of the last line of metrics.jsonl.
        val_loss: the last validation.
        best_val_loss: the best one.
        histogram_loss: the per-position histogram baseline on the same validation images.
        checkpoint: the newest checkpoint.
        parameters: numbers in the model.
        skipped: damaged images met since the start or the resume (``bad_images="skip"``).
        stopped_by: the signal that ended the run early, or None.
    """

    run: Path
    step: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    histogram_loss: float | None = None
    checkpoint: Path | None = None
    parameters: int = 0
    skipped: int = 0
    stopped_by: int | None = None


class Trainer:
    """A run in memory: opened data, model and optimizer, and how far it has come."""

    def __init__(
        self, options: PretrainOptions, device: torch.device, signals: Signals, console: Console, place: Place, *, begun: bool
    ) -> None:
        from igpt.model.image_gpt import ImageGPT

        self.device, self.signals, self.console, self.place = device, signals, console, place
        self.run, self.given = options.out, options
        remove_leftovers(self.run)
        self.checkpoint = latest_checkpoint(self.run) if begun else None
        if self.checkpoint is None and checkpoints(self.run):
            raise CheckpointError(f"every checkpoint in {self.run} is damaged; to start from step 0, move {self.run} away")
        self.data = TrainingData(options, self.checkpoint, console, self._check_memory)
        source = self.data.train.source
        config = _model_config(options, source.height, source.width, self.data.vocab)
        epoch = math.ceil(len(source) / options.batch_size)
        self.options = dataclasses.replace(
            options,
            height=config.height,
            width=config.width,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            warmup=min(epoch, options.steps // 10) if options.warmup is None else options.warmup,
        )
        self.model = ImageGPT(config)
        self.model.palette = self.data.palette
        self.model.to(device)
        self.optimizer = make_optimizer(
            self.model, lr=options.lr, beta1=options.beta1, beta2=options.beta2, weight_decay=options.weight_decay
        )
        self.val_mask = self._mask("validation", 0, len(self.data.val_tokens))
        self.step = 0
        self.saved: tuple[int, tuple[str, ...]] | None = None  # step and `pending` of the newest checkpoint
        self.window: list[float] = []  # losses since the last line of metrics.jsonl
        self.pending: list[str] = []  # what is still to be done at this step
        self.train_loss: float | None = None
        self.val_loss: float | None = None
        self.best_val_loss: float | None = None
        self.histogram_loss: float | None = None
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        else:
            self.histogram_loss = self.data.baseline(options, self.val_mask)
        if self.step > options.steps:
            raise ConfigError(f"steps: the run has made {self.step} steps already and cannot end at {options.steps}")
        if self.checkpoint is not None:
            prune(self.run, self.step, options.keep)  # one more stays when a process is killed after a save
        write_config(self.run, self.options)
        self.metrics = Metrics(self.run, self.step if begun else None, ("val_loss",) if "validate" in self.pending else ())
        last = self.metrics.last or 0
        if self.step - last > self.options.log_every:
            console.log(f"resume: {self.metrics.path} ends at step {last}, the checkpoint is of step {self.step}")

    def _check_memory(self, height: int, width: int, vocab: int) -> None:
        """Refuse what the system would kill without a word.

        Raises:
            ConfigError: a step, or the sample grids, take more than is free; says what would fit. A grid is too large.
        """
        options, cuda = self.given, self.device.type == "cuda"
        config = _model_config(options, height, width, vocab)
        free, host = available_memory(self.device), available_memory(torch.device("cpu"))
        if free is None or host is None:
            return
        refusal = memory.training_refusal(
            config,
            batch=options.batch_size,
            accumulate=options.accumulate,
            bf16=options.precision == "bf16",
            kernels=options.kernels == "auto",
            cuda=cuda,
            free=free,
            host=host,
        )
        if refusal is not None:
            raise ConfigError(f"batch_size: {refusal}")
        if options.sample_every and config.objective == "ar":
            grids.check_scale(None, options.samples, height, width)
            drawn = memory.drawing(config, images=options.samples, at_once=SAMPLES_AT_ONCE)
            check_memory(f"samples: a grid of {options.samples}", drawn.on_device(cuda), self.device, "--samples 16 is usual")

    def train(self) -> TrainResult:
        """Go on to the last step, or until a signal."""
        from igpt.kernels.use import use_kernels

        options = self.options
        with contextlib.ExitStack() as stack:
            stack.callback(self.metrics.close)
            stack.callback(self.data.train.close)
            report = stack.enter_context(use_kernels(self.model)) if options.kernels == "auto" else None
            self._log_setup(None if report is None else {row.op: row.active for row in report.rows})
            self.bar = stack.enter_context(self.console.progress(options.steps, self.step, "training", "step"))
            self.began, self.busy = time.perf_counter(), 0.0
            self.model.train()
            if self.pending:
                self._run_due_tasks(self.pending)
                if not self.pending:
                    self._save()
            while self.step < options.steps and self.signals.received is None:
                self._update()
                self._stay()
                last = self.step == options.steps
                every = {"validate": options.val_every, "sample": options.sample_every}
                self._run_due_tasks([what for what, n in every.items() if n and (self.step % n == 0 or last)])
                if (self.step % options.checkpoint_every == 0 or last) and not self.pending:
                    self._save()
            if self.signals.received is not None and self.step:
                self._save()
        return TrainResult(
            run=self.run,
            step=self.step,
            train_loss=self.train_loss,
            val_loss=self.val_loss,
            best_val_loss=self.best_val_loss,
            histogram_loss=self.histogram_loss,
            checkpoint=self.checkpoint,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            skipped=self.data.skipped,
            stopped_by=self.signals.received if self.pending or self.step < options.steps else None,
        )

    def _update(self) -> None:
        """One optimizer step, and a line of metrics when it is due."""
        options, began = self.options, time.perf_counter()
        tokens = self.data.train.batch(self.step)
        mask = self._mask("training", self.step, len(tokens))
        warmup = options.warmup or 0  # always a number by now
        rate = learning_rate(self.step, peak=options.lr, warmup=warmup, steps=options.steps, final=options.final_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for loss in self._losses(tokens, mask, options.batch_size // options.accumulate):
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().float()
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained if parameter.grad is not None])
        loss_value, norm_value = torch.stack([total, norm.float()]).tolist()  # the one wait for the device in a step
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._not_finite(loss_value, norm_value, rate)
        if options.clip:
            torch.nn.utils.clip_grads_with_norm_(trained, options.clip, norm)
        self.optimizer.step()
        self.step += 1
        self.window.append(loss_value)
        self.busy += time.perf_counter() - began
        self.bar.update()
        if self.step % options.log_every == 0 or self.step == options.steps:
            self._log(rate, norm_value, tokens[0].numel() * options.batch_size)

    def _log(self, rate: float, norm: float, pixels: int) -> None:
        loss = self.train_loss = math.fsum(self.window) / len(self.window)
        speed = pixels * len(self.window) / self.busy
        self.metrics.write(
            step=self.step,
            loss=loss,
            bits_per_pixel=loss * BITS,
            lr=rate,
            grad_norm=norm,
            pixels_per_second=speed,
            seconds=time.perf_counter() - self.began,
        )
        self.bar.set_postfix_str(f"{loss:.4f} nats = {loss * BITS:.4f} bits per pixel, {speed / 1000:,.1f}k pixels/s")
        self.window, self.busy = [], 0.0

    def _losses(self, tokens: Tensor, mask: Tensor | None, size: int) -> Iterator[Tensor]:
        return losses(self.model, tokens, mask, size, bf16=self.options.precision == "bf16")

    def _mask(self, what: Purpose, step: int, images: int) -> Tensor | None:
        return draw_mask(self.model, self.options.seed, what, step, images)

    def _run_due_tasks(self, due: list[str]) -> None:
        """Validate and sample where due. A signal breaks that off; what is left then is done after the resume."""
        possible = {"validate": len(self.data.val_tokens) > 0, "sample": self._draws}
        self.pending = [what for what in due if possible[what]]
        with contextlib.suppress(Stopped):
            while self.pending:
                {"validate": self._validate, "sample": self._sample}[self.pending[0]]()
                self.pending.pop(0)

    def _validate(self) -> None:
        from igpt.model.inference import evaluating

        tokens, size = self.data.val_tokens, self.options.batch_size // self.options.accumulate
        with (
            self.signals.may_raise(),
            evaluating(self.model),
            self.console.progress(len(tokens), 0, "validating", "img") as bar,
        ):
            total = []
            for part in self._losses(tokens, self.val_mask, size):
                total.append(float(part))
                bar.update(size)
        loss = math.fsum(total) if all(map(math.isfinite, total)) else math.nan
        if not math.isfinite(loss):
            raise NonFiniteError(f"the validation loss is not finite at step {self.step}. A lower --lr often helps")
        self.val_loss = loss
        self.best_val_loss = loss if self.best_val_loss is None else min(loss, self.best_val_loss)
        base = self.histogram_loss
        assert base is not None
        self.metrics.write(
            step=self.step,
            val_loss=loss,
            val_bits_per_pixel=loss * BITS,
            histogram_loss=base,
            histogram_bits_per_pixel=base * BITS,
            seconds=time.perf_counter() - self.began,
        )
        trained = "" if self.train_loss is None else f"training {self.train_loss:.4f}, "
        self.console.log(
            f"step {self.step}: {trained}validation {loss:.4f} nats = {loss * BITS:.4f} bits per pixel "
            f"(histogram {base:.4f} = {base * BITS:.4f})"
        )

    def _sample(self) -> None:
        from igpt.generation.sample import sample

        config, palette = self.model.config, self.data.palette
        assert palette is not None
        with self.signals.may_raise():
            tokens = sample(
                self.model,
                self.options.samples,
                seed=self.options.seed,
                batch_size=SAMPLES_AT_ONCE,
                progress=self.console.is_interactive,
            )
            picture = io.BytesIO()
            grids.grid(palette.decode(tokens, config.height, config.width)).save(picture, "PNG")
        path = self.run / SAMPLES / f"step-{self.step}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            write_durably(path, picture.getvalue())
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {reason(error)}") from error

    def _stay(self) -> None:
        """Look whether the run's folder is where it was. One that was moved gets a checkpoint before the run ends.

        Raises:
            CheckpointError: it is not; says where it is and what is saved.
        """
        found = self.place.find()
        if found == self.run:
            return
        if found is None:
            raise CheckpointError(f"out: {self.run} was moved or removed while it trained, after step {self.step}")
        moved, self.run = self.run, found
        self._save()
        raise CheckpointError(
            f"out: {moved} was moved to {found} while it trained; step {self.step} is saved there, and --resume goes on there"
        )

    def _save(self) -> None:
        if self.saved == (self.step, tuple(self.pending)):
            return
        self.metrics.flush_to_disk()
        state = {name: getattr(self, name) for name in _STATE} | {"conditions": self._conditions()}
        self.checkpoint = save_checkpoint(
            self.run, self.step, model=self.model, optimizer=self.optimizer, state=state, keep=self.options.keep
        )
        self.saved = (self.step, tuple(self.pending))

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, model=self.model, optimizer=self.optimizer)
        self.step = state["step"]
        if checkpoint.name != f"step-{self.step}":
            raise CheckpointError(f"{checkpoint / 'state.json'}: step is {self.step}, the folder is named {checkpoint.name}")
        for name, fits in _STATE.items():
            value = state.get(name, ...)
            if not fits(value):
                raise CheckpointError(f"{checkpoint / 'state.json'}: {name} cannot be {str(value)[:80]}")
            setattr(self, name, value)
        updates = {float(moments["step"]) for moments in self.optimizer.state.values()}
        if updates - {float(self.step)}:
            raise CheckpointError(f"{checkpoint}: the optimizer has made {sorted(updates)} steps, the run {self.step}")
        self.saved = (self.step, tuple(self.pending))
        self.console.log(f"resume: {checkpoint}")
        old, new = state.get("conditions"), self._conditions()
        old = old if isinstance(old, dict) else {}
        changed = [f"{name} {old.get(name)} -> {value}" for name, value in new.items() if old.get(name) != value]
        if changed:
            self.console.log(f"resume: {', '.join(changed)}; the run goes on, but no longer bit for bit as it began")

    def _conditions(self) -> dict[str, str]:
        """What rounding depends on, besides the settings."""
        return versions() | {"device": str(self.device), "threads": str(torch.get_num_threads())}

    def _not_finite(self, loss: float, norm: float, rate: float) -> NonFiniteError:
        """Write what is known about the failed step, and give the error to raise."""
        from igpt.data.orders import order

        options, step = self.options, self.step + 1
        drawn = order(len(self.data.train.source), options.seed, self.step * options.batch_size, options.batch_size)
        gradients = {name: p.grad.norm().item() for name, p in self.model.named_parameters() if p.grad is not None}
        facts = {
            "step": step,
            "lr": rate,
            "loss": _number(loss),
            "grad_norm": _number(norm),
            "images": drawn.tolist(),
            "grad_norms": {name: _number(value) for name, value in gradients.items()},
        }
        path = self.run / f"nonfinite-step-{step}.json"
        with contextlib.suppress(OSError):  # the error itself matters more than its details
            write_durably(path, json.dumps(facts, indent=1).encode())
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        kept = "no checkpoint yet" if self.checkpoint is None else f"the last checkpoint is {self.checkpoint}"
        return NonFiniteError(
            f"{what} at step {step} (lr {rate:.3g}); the weights were not updated, {kept}, details are in {path}. "
            "A lower --lr, a longer --warmup or --clip 1 often helps"
        )

    def _log_setup(self, kernels: dict[str, str] | None) -> None:
        config, data = self.model.config, self.data
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.console.log(
            f"model: {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, {parameters:,} parameters, "
            f"{config.height} x {config.width} pixels, {config.vocab_size} colours, objective {config.objective}"
        )
        for line in data.describe():
            self.console.log(line)
        if self.histogram_loss is not None:
            base = self.histogram_loss
            self.console.log(f"baseline: histogram of each position, {base:.4f} nats = {base * BITS:.4f} bits per pixel")
        if not self._draws:
            why = "no palette to draw with" if data.palette is None else "a bert model cannot draw"
            self.console.log(f"samples: none, {why}")
        active = "off" if kernels is None else ", ".join(f"{op} {name}" for op, name in kernels.items())
        self.console.log(f"kernels: {active}; {self.device}, {self.options.precision}; folder {self.run}")

    @property
    def _draws(self) -> bool:
        return self.data.palette is not None and self.model.config.objective == "ar"


def _is_loss(value: object) -> bool:
    """Nats per pixel are never below 0."""
    return value is None or (isinstance(value, float) and value >= 0)


# What state.json keeps of a `Trainer`, and what it may be.
_STATE: dict[str, Callable[[Any], bool]] = {
    "train_loss": _is_loss,
    "val_loss": _is_loss,
    "best_val_loss": _is_loss,
    "histogram_loss": _is_loss,
    "window": lambda value: isinstance(value, list) and None not in value and all(map(_is_loss, value)),
    "pending": lambda value: isinstance(value, list) and value in ([], ["validate"], ["sample"], ["validate", "sample"]),
}


def _model_config(options: PretrainOptions, height: int, width: int, vocab: int) -> ImageGPTConfig:
    changes: dict[str, Any] = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd")}
    changes = {name: value for name, value in changes.items() if value is not None}
    changes |= {"height": height, "width": width, "vocab_size": vocab}
    return preset(options.preset, attention=options.attention, objective=options.objective, **changes)


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity: those become words."""
    return value if math.isfinite(value) else str(value)
