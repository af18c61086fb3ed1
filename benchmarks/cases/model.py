"""Cases of whole models: a training step, and one more pixel of an image that is being drawn."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import igpt
from benchmarks.registry import MODELS, Case, Cost, Method, Operation, Workload
from igpt.model.config import ImageGPTConfig, PresetName
from igpt.model.image_gpt import Cache, ImageGPT
from igpt_kernels import layouts, testing

LAYERS = 2
"""Depth at which a method is checked: every kind of layer, at the width and heads that are timed."""
CHECKED = 32
"""Largest image side at which a whole model is checked against float64."""
PATTERN = "local2d:7"
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Subject:
    """How a method makes its model: from one of ours, whose weights it takes if `layers` is None, else anew with as many."""

    wrap: Callable[[ImageGPT, int | None], Any]
    logits: Callable[[Any, Tensor], Tensor]
    loss: Callable[[Any, Tensor], Tensor]
    step: Callable[[Any, Case], Callable[[], Tensor]]
    table: str
    """Name of the token table's weight: its gradient passes through every layer."""
    sparse: bool = False
    config: str = ""


def config_of(case: Case, *, layers: int | None = None, sparse: bool = False) -> ImageGPTConfig:
    """The model of a case, or a shallow one like it."""
    height, width = case.size
    changes: dict[str, Any] = {"height": height, "width": width, "attention": (PATTERN if sparse else "dense",)}
    name = cast(PresetName, MODELS[case.preset])
    return igpt.preset(name, **changes, **({} if layers is None else {"n_layer": layers}))


@contextlib.contextmanager
def _precision(case: Case) -> Iterator[None]:
    """Training: float32 weights; products in bfloat16 by autocast where the case says so. Sampling has weights of the dtype."""
    if case.dtype == "float32":
        yield
        return
    with torch.autocast(case.device, getattr(torch, case.dtype)):
        yield


def _fresh(config: ImageGPTConfig, device: str) -> ImageGPT:
    """A model whose output matrix is not zero, so that every gradient is alive."""
    torch.manual_seed(0)
    with torch.device(device):
        model = ImageGPT(config)
    with torch.no_grad():
        model.head.weight.normal_(std=config.n_embd**-0.5)
    return model


def _ours_logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def _ours_loss(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens, tokens).loss


def _ours_step(model: Any, case: Case) -> Callable[[], Tensor]:
    """The last pixel of an image, its cache full of random keys and values."""
    cache: Cache = model.new_cache(case.batch)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    token = torch.randint(model.config.vocab_size, (case.batch, 1), device=case.device)

    def run() -> Tensor:
        cache.length = case.tokens - 1
        with torch.no_grad():
            return model.decode(token, cache)

    return run


def _ours(kernels: bool, sparse: bool = False) -> Callable[[Case], Subject]:
    def wrap(model: ImageGPT, layers: int | None) -> ImageGPT:
        if kernels:
            igpt.use_kernels(model)
        return model

    def make(case: Case) -> Subject:
        words = "use_kernels" if kernels else "plain"
        return Subject(
            wrap, _ours_logits, _ours_loss, _ours_step, "wte.weight", sparse, f"{words}, {PATTERN}" if sparse else words
        )

    return make


def _theirs(model: ImageGPT, layers: int | None) -> Any:
    """transformers' model: with the weights of ours, or of its own, with as many layers."""
    from transformers import ImageGPTConfig as TheirConfig
    from transformers import ImageGPTForCausalImageModeling as TheirModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if layers is None:
            return TheirModel.from_pretrained(folder).to(model.device)
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return TheirModel(TheirConfig(**{**values, "n_layer": layers})).to(model.device)


def _their_logits(model: Any, tokens: Tensor) -> Tensor:
    start = tokens.new_full((tokens.shape[0], 1), model.config.vocab_size - 1)
    return model(input_ids=torch.cat([start, tokens[:, :-1]], 1), use_cache=False).logits


def _their_loss(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(_their_logits(model, tokens).flatten(0, 1), tokens.flatten())


def _their_step(model: Any, case: Case) -> Callable[[], Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache()
    dtype = getattr(torch, case.dtype)
    for layer in range(model.config.n_layer):
        shape = (case.batch, case.heads, case.tokens - 1, case.head_dim)
        cache.update(torch.randn(shape, device=case.device).to(dtype), torch.randn(shape, device=case.device).to(dtype), layer)
    token = torch.randint(model.config.vocab_size - 1, (case.batch, 1), device=case.device)

    def run() -> Tensor:
        if cache.get_seq_length() >= case.tokens:
            cache.crop(case.tokens - 1 - cache.get_seq_length())  # the pixel that the call before has added
        with torch.no_grad():
            return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]

    return run


def _hugging_face(swap: str) -> Callable[[Case], Subject]:
    def wrap(model: ImageGPT, layers: int | None) -> Any:
        made = _theirs(model, layers)
        if swap == "kernels":
            igpt.use_kernels(made)
        elif swap == "compile":
            made.forward = torch.compile(made.forward, dynamic=False)
        return made

    def make(case: Case) -> Subject:
        words = {"": "transformers, eager", "kernels": "transformers, use_kernels", "compile": "transformers, torch.compile"}
        return Subject(wrap, _their_logits, _their_loss, _their_step, "transformer.wte.weight", False, words[swap])

    return make


def _model(case: Case, subject: Subject) -> Any:
    """The model that is timed, with random weights."""
    config = config_of(case, sparse=subject.sparse)
    if subject.table == "wte.weight":
        return subject.wrap(_fresh(config, case.device), None)
    return subject.wrap(_fresh(replace(config, n_layer=1), case.device), config.n_layer)


def train_prepare(case: Case, subject: Subject) -> Workload:
    """Forward, loss, backward and AdamW on random tokens."""
    model = _model(case, subject).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    tokens = torch.randint(512, (case.batch, case.tokens), device=case.device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with _precision(case):
            loss = subject.loss(model, tokens)
        loss.backward()
        optimizer.step()

    return Workload({"step": step}, None, subject.config, case.method == "hf-compile")


def _small(case: Case) -> Case:
    """The case that is checked: shallow, and at most `CHECKED` pixels a side."""
    side = min(case.resolution, CHECKED)
    return replace(case, batch=1, resolution=side, tokens=side * side)


def train_verify(case: Case, subject: Subject) -> float:
    """Loss and gradients of token table, positions and output matrix, with two layers, against a float64 model."""
    case = _small(case)
    plain = _fresh(config_of(case, layers=LAYERS, sparse=subject.sparse), case.device)
    tokens = torch.randint(512, (1, case.tokens), device=case.device)
    mine = subject.wrap(plain_copy(plain), None)
    names = ("wte.weight", "wpe.weight", "head.weight")
    theirs = ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")

    def result(model: nn.Module, loss: Callable[[Any, Tensor], Tensor], wanted: tuple[str, ...]) -> list[Tensor]:
        parameters = dict(model.named_parameters())
        some = [parameters[name] for name in wanted]
        with _precision(case) if some[0].dtype != torch.float64 else contextlib.nullcontext():
            value = loss(model, tokens)
        return [value.detach()[None], *torch.autograd.grad(value, some)]

    exact = result(plain_copy(plain).double(), _ours_loss, names)
    eager = result(plain, _ours_loss, names)
    found = result(mine, subject.loss, names if subject.table == "wte.weight" else theirs)
    found[1] = found[1][: exact[1].shape[0]]  # their table has a row more, the start symbol's
    worst = 0.0
    for place, (actual, true, low) in enumerate(zip(found, exact, eager, strict=True)):
        factor = testing.GRADIENT_FACTOR if place else testing.OUTPUT_FACTOR
        name = f"gradient of {names[place - 1]}" if place else "loss"
        # Gradients sum terms over all pixels; a rounding is one of the largest sum.
        worst = max(worst, testing.error_ratio(actual, true, low, factor=factor, floor=8.0 if not place else 1.0, name=name))
    return worst


def plain_copy(model: ImageGPT) -> ImageGPT:
    """A model of the same weights, plain."""
    made = ImageGPT(model.config).to(model.device, model.wpe.weight.dtype)
    made.load_state_dict(model.state_dict())
    return made


def _parameters(case: Case) -> int:
    """Weights of a model's matrices; tables are looked up, not multiplied."""
    config = config_of(case)
    return config.n_layer * 12 * config.n_embd**2 + config.vocab_size * config.n_embd


def train_cost(case: Case, way: str) -> Cost:
    """Three products of each weight with each pixel, and 14·B·H·pairs·D of attention a layer."""
    config = config_of(case)
    height, width = case.size
    layout = layouts.parse(PATTERN if case.method == "sparse" else "dense", height, width)
    pairs = layout.pairs if case.method == "sparse" else case.tokens * (case.tokens + 1) // 2
    matrices = 6.0 * _parameters(case) * case.batch * case.tokens
    attention = 14.0 * config.n_layer * case.batch * case.width * pairs
    return Cost(matrices + attention, 0.0, "compute", "6·weights·B·T + 14·L·B·H·pairs·D", "pixels", case.batch * case.tokens)


def sample_prepare(case: Case, subject: Subject) -> Workload:
    """The logits of one more pixel, at the end of an image."""
    model = _model(case, subject).eval().to(getattr(torch, case.dtype))
    call = subject.step(model, case)
    return Workload({"forward": call}, call, subject.config)


def sample_verify(case: Case, subject: Subject) -> float:
    """Logits of all pixels with two layers against float64; ours also pixel by pixel through the cache."""
    case = _small(case)
    dtype = getattr(torch, case.dtype)
    plain = _fresh(config_of(case, layers=LAYERS, sparse=subject.sparse), case.device).to(dtype)
    tokens = torch.randint(512, (1, case.tokens), device=case.device)
    mine = subject.wrap(plain_copy(plain), None).eval().to(dtype)
    with torch.no_grad():
        exact = plain_copy(plain).double()(tokens).logits
        eager, found = plain(tokens).logits, subject.logits(mine, tokens)[..., :512]
        if subject.table == "wte.weight":
            # The last pixel comes from a cache that holds all before it: the step that is timed.
            cache = mine.new_cache(1)
            mine.decode(tokens[:, :-2], cache)
            found = found.clone()
            found[:, -1] = mine.decode(tokens[:, -2:-1], cache)
    return testing.error_ratio(found, exact, eager, factor=testing.OUTPUT_FACTOR)


def sample_cost(case: Case, way: str) -> Cost:
    """Every weight and every cached key and value is read once."""
    config = config_of(case)
    cached = 2 * config.n_layer * case.batch * case.width * case.tokens
    size = getattr(torch, case.dtype).itemsize
    read = size * (_parameters(case) + cached)
    flops = 2.0 * _parameters(case) * case.batch + 2.0 * cached
    return Cost(flops, float(read), "memory", "weights and cache read once", "pixels", case.batch)


def _kept_scores(case: Case, way: str) -> tuple[int, str]:
    """What the backward pass of a plain model keeps of attention: weights and a mask, for every layer."""
    config = config_of(case)
    one = case.batch * case.heads * case.tokens**2 * getattr(torch, case.dtype).itemsize
    masks = config.n_layer * case.tokens**2
    return config.n_layer * one + 2 * one + masks, (
        f"attention weights of {config.n_layer} layers × {case.batch * case.heads} heads × {case.tokens:,}²"
    )


def _not_yet(case: Case, way: str) -> str:
    """Whether `use_kernels` of this version takes transformers' models: asked of a tiny one, made once a process."""
    if _ANSWER.get("hf") is None:
        from transformers import ImageGPTConfig as TheirConfig
        from transformers import ImageGPTForCausalImageModeling as TheirModel

        tiny = TheirModel(TheirConfig(n_layer=1, n_head=1, n_embd=16, vocab_size=9, n_positions=4))
        try:
            igpt.use_kernels(tiny).restore()
            _ANSWER["hf"] = ""
        except TypeError as error:
            _ANSWER["hf"] = f"not in this version: {error}"
    return _ANSWER["hf"]


_ANSWER: dict[str, str] = {}
THEIRS = ("transformers",)
THEIR_MODEL = ("transformers.models.imagegpt.modeling_imagegpt",)


def _methods(*, train: bool) -> dict[str, Method]:
    heavy = _kept_scores if train else None
    methods = {
        "hf-eager": Method(_hugging_face(""), THEIRS, THEIR_MODEL, memory=heavy),
        "plain": Method(_ours(False), memory=heavy),
    }
    if train:  # a cache that grows compiles anew at every pixel
        methods["hf-compile"] = Method(_hugging_face("compile"), THEIRS, THEIR_MODEL, memory=heavy, compiled=True)
    return methods | {
        "hf-kernels": Method(_hugging_face("kernels"), THEIRS, THEIR_MODEL, refuses=_not_yet),
        "kernels": Method(_ours(True)),
        "sparse": Method(_ours(True, sparse=True)),
    }


OPERATIONS = [
    Operation("train", "step", ("use_kernels",), ("step",), train_prepare, train_verify, train_cost, _methods(train=True)),
    Operation(
        "sample", "pixel", ("use_kernels",), ("forward",), sample_prepare, sample_verify, sample_cost, _methods(train=False)
    ),
]
