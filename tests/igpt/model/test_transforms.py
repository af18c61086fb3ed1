"""What transforms, tracers and compilers of torch make of a model: the right value, with kernels and without, or an error."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import igpt
from igpt.errors import ConfigError
from igpt.model.image_gpt import ImageGPT
from tests.models import random_model

TOKENS = torch.randint(0, 7, (3, 24), generator=torch.Generator().manual_seed(0))


def small(**changes: Any) -> ImageGPT:
    torch.manual_seed(0)
    values = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 7, "height": 4, "width": 6, **changes}
    return random_model(0.3, **values)


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., ImageGPT]]:
    """Makes models, in plain or in kernel mode."""
    if request.param:
        with igpt.use_kernels(attention="torch", norm="torch", mlp="torch", loss="torch"):
            yield small
    else:
        yield small


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def loss(model: ImageGPT, values: dict[str, Tensor], tokens: Tensor) -> Tensor:
    return functional_call(model, values, (tokens, tokens)).loss


def test_functional_call(make: Callable[..., ImageGPT]) -> None:
    model, other = make(), make()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    found = functional_call(model, {name: 1.5 * value for name, value in weights(model).items()}, (TOKENS,)).logits
    torch.testing.assert_close(found, other(TOKENS).logits)


@pytest.fixture(params=[False, True], ids=["plain", "kernels"])
def _auto(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels by "auto": forward-mode derivatives are those of the reference."""
    with igpt.use_kernels() if request.param else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("_auto")
@pytest.mark.parametrize("pattern", ["dense", "local2d:3"])
def test_functional_derivatives(pattern: str) -> None:
    model = small(attention=pattern)
    values = weights(model)
    model(TOKENS, TOKENS).loss.backward()
    expected = {name: value.grad for name, value in model.named_parameters()}
    whole = grad(lambda values: loss(model, values, TOKENS))(values)
    torch.testing.assert_close(whole, expected)
    each = vmap(grad(lambda values, image: loss(model, values, image[None])), in_dims=(None, 0))(values, TOKENS)
    torch.testing.assert_close({name: value.mean(0) for name, value in each.items()}, expected)
    towards = {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) for name, value in values.items()}
    _, tangent = jvp(lambda values: loss(model, values, TOKENS), (values,), (towards,))
    slope = sum((expected[name] * towards[name]).sum() for name in values)
    torch.testing.assert_close(tangent, slope, rtol=1e-4, atol=1e-5)
    columns = jacfwd(lambda sos: loss(model, {**values, "sos": sos}, TOKENS))(values["sos"])
    torch.testing.assert_close(columns, expected["sos"], rtol=1e-4, atol=1e-6)
    outer = torch.ones(2, 3, 24, 7) * torch.tensor([1.0, 2.0])[:, None, None, None]
    (batched,) = torch.autograd.grad(model(TOKENS).logits, model.sos, outer, is_grads_batched=True)
    torch.testing.assert_close(batched[1], 2 * batched[0])


def test_a_backend_asked_for_by_name_refuses_forward_mode() -> None:
    model = small()
    values = weights(model)
    with igpt.use_kernels(norm="torch"), pytest.raises(ValueError, match=r"rms_norm cannot run.*forward-mode derivatives"):
        jvp(lambda values: loss(model, values, TOKENS), (values,), (values,))


def test_vmap_over_images(make: Callable[..., ImageGPT]) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators without a batching rule run in a loop
        found = vmap(lambda image: model(image[None]).logits[0])(TOKENS)
        features = vmap(lambda image: model.features(image[None])[:, 0])(TOKENS)
    torch.testing.assert_close(found, model(TOKENS).logits)
    torch.testing.assert_close(features, model.features(TOKENS).movedim(1, 0))


def test_fake_and_meta_tensors(make: Callable[..., ImageGPT]) -> None:
    model = make()
    with FakeTensorMode():
        fake, tokens = ImageGPT(model.config), torch.zeros(3, 24, dtype=torch.int64)
        assert fake(tokens).logits.shape == (3, 24, 7)
        assert fake.features(tokens).shape == (3, 3, 16)
        assert fake.decode(tokens[:, :4], fake.new_cache(3)).shape == (3, 7)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        assert model(mode.from_tensor(TOKENS)).logits.shape == (3, 24, 7)
    empty, tokens = make().to("meta"), TOKENS.to("meta")
    assert empty(tokens).logits.shape == (3, 24, 7)
    assert empty(tokens, tokens.clone()).loss.shape == ()
    assert empty.features(tokens).shape == (3, 3, 16)
    assert empty.decode(tokens[:, :4], empty.new_cache(3)).shape == (3, 7)
    with pytest.raises(ConfigError, match=r"tokens must be on the device of the weights \(cpu\), got meta"):
        model(tokens)


def test_fake_losses(make: Callable[..., ImageGPT]) -> None:
    with FakeTensorMode():
        fake, tokens = ImageGPT(make().config), torch.zeros(3, 24, dtype=torch.int64)
        fake(tokens, tokens.clone()).loss.backward()
        assert fake.wte.weight.grad.shape == (7, 16)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: str, make: Callable[..., ImageGPT]) -> None:
    model = make()
    traced = make_fx(lambda tokens: model(tokens).logits, tracing_mode=mode, _allow_non_fake_inputs=True)(TOKENS)
    torch.testing.assert_close(traced(TOKENS), model(TOKENS).logits)
    if mode == "symbolic":
        torch.testing.assert_close(traced(TOKENS[:2]), model(TOKENS[:2]).logits)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, make: Callable[..., ImageGPT]) -> None:
    model = make()
    if not strict:
        program = torch.export.export(model, (TOKENS,))
        torch.testing.assert_close(program.module()(TOKENS).logits, model(TOKENS).logits)
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {"tokens": {0: batch}, "targets": {0: batch}}
    program = torch.export.export(model, (TOKENS,), {"targets": TOKENS.clone()}, dynamic_shapes=shapes, strict=strict)
    for count in (1, 3):
        given = TOKENS[:count]
        torch.testing.assert_close(program.module()(given, targets=given).loss, model(given, given).loss)


@pytest.mark.slow
def test_compile_with_dynamic_batches(make: Callable[..., ImageGPT]) -> None:
    model = make(n_layer=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for count in (3, 2):
        given = TOKENS[:count]
        torch.testing.assert_close(compiled(given, given).loss, model(given, given).loss)
    torch.testing.assert_close(compiled(TOKENS[:0], TOKENS[:0]).loss, torch.tensor(0.0))


def test_outputs_are_trees_of_tensors() -> None:
    output = small()(TOKENS)
    leaves, form = pytree.tree_flatten(output)
    again = pytree.tree_unflatten(leaves, form)
    assert torch.equal(again.logits, output.logits)
    assert again.loss is None


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_the_mean_over_nothing_is_zero(objective: str, make: Callable[..., ImageGPT]) -> None:
    model = make(objective=objective)
    nothing = torch.zeros(0, 24, dtype=torch.int64)
    assert model(nothing).logits.shape == (0, 24, 7)
    assert model.features(nothing).shape == (3, 0, 16)
    cases = [(nothing, nothing), (nothing, nothing.clone()), (TOKENS, torch.full_like(TOKENS, -100))]
    for tokens, targets in cases:
        model.zero_grad()
        loss = model(tokens, targets).loss
        assert loss.item() == 0
        loss.backward()
        for name, value in model.named_parameters():
            assert value.grad is not None, name
            assert not value.grad.any(), name
    if objective == "ar":
        assert model.decode(nothing[:, :0], model.new_cache(0)).shape == (0, 7)


@pytest.mark.parametrize("objective", ["ar", "bert"])
def test_a_broken_model_has_no_loss_of_zero(objective: str, make: Callable[..., ImageGPT]) -> None:
    model = make(objective=objective)
    with torch.no_grad():
        model.ln_f.weight[0] = torch.nan
    assert model(TOKENS, TOKENS.clone()).loss.isnan()


class Named(Tensor):
    """A subclass by __torch_function__, whose name stays."""


class Quantized(Tensor):
    """A weight of int8 and a scale, as torchao has them: every operation computes with its float value."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, value: Tensor) -> Quantized:
        scale = value.abs().amax() / 127
        return cls((value / scale).round().to(torch.int8), scale)

    def value(self) -> Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        if func is torch.ops.aten.isfinite.default:
            raise NotImplementedError(func)
        plain = pytree.tree_map_only(Quantized, lambda weight: weight.value(), (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@pytest.mark.filterwarnings("ignore:(loss|norm) runs as plain")
@pytest.mark.parametrize("kind", ["function", "dispatch"])
def test_weights_of_a_subclass(kind: str, make: Callable[..., ImageGPT]) -> None:
    model, other = make(), make()
    for module, plain in zip(model.modules(), other.modules(), strict=True):
        weight = getattr(module, "weight", None)
        if weight is not None:
            made = Quantized.of(weight.detach()) if kind == "dispatch" else weight.detach().as_subclass(Named)
            module.weight = nn.Parameter(made, requires_grad=False)
            plain.weight = nn.Parameter(made.value() if kind == "dispatch" else weight.detach().clone())
    assert type(model.head.weight) is (Quantized if kind == "dispatch" else Named) or kind == "function"
    torch.testing.assert_close(torch.as_tensor(model(TOKENS).logits).as_subclass(Tensor), other(TOKENS).logits)
    torch.testing.assert_close(model(TOKENS, TOKENS).loss.as_subclass(Tensor), other(TOKENS, TOKENS).loss)
    torch.testing.assert_close(model.features(TOKENS).as_subclass(Tensor), other.features(TOKENS))
    assert torch.equal(igpt.sample(model, 2, seed=1), igpt.sample(other, 2, seed=1))
    assert torch.equal(igpt.complete(model, TOKENS, n=2), igpt.complete(other, TOKENS, n=2))


def test_dtypes_that_do_not_compute_are_named(make: Callable[..., ImageGPT]) -> None:
    with pytest.raises(ConfigError, match=r"weights must be float16, .* got .* float8_e4m3fn"):
        make().to(torch.float8_e4m3fn)(TOKENS)
    mixed = make().bfloat16()
    for block in mixed.blocks:
        block.ln_1.float()
    for call in (lambda: mixed(TOKENS), lambda: mixed(TOKENS, TOKENS), lambda: igpt.sample(mixed, 1)):
        with pytest.raises(ConfigError, match=r"weights must have one dtype, or run under torch\.autocast; got .* bfloat16"):
            call()
    with torch.autocast("cpu", torch.bfloat16):
        assert mixed(TOKENS, TOKENS).loss.isfinite()
        assert igpt.sample(mixed, 1).shape == (1, 24)


def test_a_layer_of_another_dtype_has_its_own_cache() -> None:
    model = small()
    model.blocks[1].attn.double()
    model.blocks[1].attn.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), *inputs[1:]))
    model.blocks[1].attn.register_forward_hook(lambda _, __, output: output.float())
    cache = model.new_cache(3)
    for at in range(23):
        logits = model.decode(TOKENS[:, at : at + 1], cache)
    assert [table.dtype for table in cache.keys] == [torch.float32, torch.float64]
    torch.testing.assert_close(logits, model(TOKENS).logits[:, -1], atol=1e-5, rtol=1e-5)
