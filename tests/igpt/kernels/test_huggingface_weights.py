"""Weights of a swapped model of transformers that are not its own plain parameters: given, adapted, quantized, moved."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from transformers import ImageGPTForCausalImageModeling

import igpt
from tests.huggingface import close, make, result

KERNELS_OFF = {"attention": "off", "norm": "off", "mlp": "off"}


class Rows(Tensor):
    """int8 rows with a scale each, as libraries of quantization have them."""

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype, device=rows.device)  # type: ignore[attr-defined]

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, weight: Tensor) -> Any:
        scale = weight.detach().abs().amax(-1, keepdim=True) / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        args, kwargs = pytree.tree_map_only(cls, lambda x: x.rows * x.scale, (args, kwargs or {}))
        return func(*args, **kwargs)


class Negative(Tensor):
    """Not linear to the outside: each product has the other sign."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        return -made if "mul" in func.__name__ else made


def change_norms(model: Any, change: Callable[[Any], Any]) -> Any:
    for name, module in model.named_modules():
        if "ln_" in name:
            change(module)
    return model


def subclassed(kind: Callable[[Tensor], Any]) -> Callable[[Any], Any]:
    def change(module: Any) -> None:
        module.weight = nn.Parameter(kind(module.weight), requires_grad=False)

    return change


NORMS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "quantized": (subclassed(Rows.of), "a tensor is a Rows"),
    "a subclass": (subclassed(lambda weight: weight.detach().as_subclass(Negative)), "a tensor is a Negative"),
    "float64": (lambda module: module.double(), "float64 and another dtype meet"),
    "a number": (subclassed(lambda weight: weight.detach().mean()), "the weight is [], not one row"),
    "more dimensions": (subclassed(lambda weight: weight.detach()[None, None]), "the weight is [1, 1, 48], not one row"),
    "eps of a tensor": (lambda module: setattr(module, "eps", torch.tensor(0.3)), "eps is tensor"),
    "eps below 0": (lambda module: setattr(module, "eps", -1e-9), "eps is -1e-09"),
}


@pytest.mark.filterwarnings("ignore:.* runs as plain:RuntimeWarning")
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("inside", [False, True])
def test_norms_that_the_kernel_cannot_take(model: Any, tokens: Tensor, name: str, inside: bool) -> None:
    change, reason = NORMS[name]
    changed = change_norms(copy.deepcopy(model), change)
    wanted = result(changed.double() if name == "float64" else changed, tokens)
    if not inside:
        change_norms(model, change)
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        if inside:
            change_norms(model, change)
        if name == "float64":
            model.lm_head.double()
            for block in model.transformer.h:
                block.mlp.double(), block.attn.double()
        close(result(model, tokens), wanted)
    assert name == "float64" or any(reason in one for one in report.refused("norm"))


def test_quantized_projections(model: Any, tokens: Tensor) -> None:
    for name, module in model.named_modules():
        if name.endswith(("c_attn", "c_proj", "c_fc", "wte")):
            module.weight = nn.Parameter(Rows.of(module.weight), requires_grad=False)
    wanted = result(model, tokens)
    with igpt.use_kernels(model, match_hf_scale=True, strict=True, loss="off", palette="off") as report:
        close(result(model, tokens), wanted)
        assert report.calls("attention") == 2


def test_functional_call_takes_the_given_weights(model: Any, tokens: Tensor) -> None:
    given = {name: (1.3 * value).detach().requires_grad_() for name, value in model.named_parameters()}
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0

    def run(**options: Any) -> tuple[Tensor, ...]:
        logits = torch.func.functional_call(model, given, (), {"input_ids": tokens, **options}).logits
        return logits, *torch.autograd.grad(logits.square().sum(), list(given.values()), allow_unused=True)

    wanted, padded = run(), run(attention_mask=mask)
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        for actual, expected in zip(run(), wanted, strict=True):
            close(actual, expected)
        assert report.calls("attention") == 2
        with pytest.warns(RuntimeWarning, match="padded"):
            found = run(attention_mask=mask)
        for actual, expected in zip(found, padded, strict=True):
            close(actual, expected)


def test_derivatives_of_torch_func_while_swapped(tokens: Tensor) -> None:
    """grad, gradients of each sample, and tangents: those of the model as it was. Tangents of kernels were 0."""
    model = make().double()
    given = {name: value.detach() for name, value in model.named_parameters()}
    towards = {name: torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x) for name, x in given.items()}

    def loss(given: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (), {"input_ids": tokens}).logits.square().mean()  # type: ignore[no-any-return]

    def derivatives() -> Any:
        whole = torch.func.grad(loss)(given, tokens)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, tokens[:, None])
        return whole, each, torch.func.jvp(lambda given: loss(given, tokens), (given,), (towards,))

    wanted = derivatives()
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        found = derivatives()
        assert report.calls("attention") == report.calls("mlp") == 3 * 2
    for actual, expected in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_moved_and_cast_while_swapped(tokens: Tensor) -> None:
    exact = result(make().double(), tokens)
    for cast in (lambda model: model.half(), lambda model: model.to(torch.bfloat16), lambda model: model.double()):
        model = make()
        with igpt.use_kernels(model, match_hf_scale=True) as report:
            cast(model)
            swapped = result(model, tokens)
            assert [report.calls(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
        plain = result(model, tokens)
        assert swapped.dtype == plain.dtype
        assert (swapped - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-12
    for dtype in (torch.bfloat16, torch.float16):  # as mixed precision leaves them
        model = change_norms(make().to(dtype), lambda module: module.float())
        with torch.autocast("cpu", dtype=dtype):
            plain = result(model, tokens)
            with igpt.use_kernels(model, match_hf_scale=True) as report:
                swapped = result(model, tokens)
        assert [report.calls(op) for op in ("attention", "norm", "mlp")] == [2, 5, 2]
        assert swapped.dtype == plain.dtype
        assert (swapped - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_without_values(model: Any, tokens: Tensor) -> None:
    """Meta tensors and a fake mode compute shapes alone, and leave nothing of theirs in the model."""
    wanted, weights = result(model, tokens), copy.deepcopy(model.state_dict())
    mask = torch.ones_like(tokens)
    mask[0, 15:] = 0
    with igpt.use_kernels(model, match_hf_scale=True) as report:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(tokens)
            assert result(model, fake).shape == wanted.shape
            with pytest.warns(RuntimeWarning, match="padded"):
                result(model, fake, attention_mask=mode.from_tensor(mask))
            inner = igpt.use_kernels(model, attention="off")
            inner.restore()
        assert {type(one) for one in model.buffers()} == {Tensor}
        close(result(model, tokens), wanted)
        calls = report.calls("attention")
        assert calls == 4
        model.to("meta")
        assert result(model, tokens.to("meta")).shape == wanted.shape
        assert report.calls("attention") == calls + 2
        model.to_empty(device="cpu")
        model.load_state_dict(weights)
        close(result(model, tokens), wanted)
    with FakeTensorMode():
        built, fake = make(), torch.zeros(2, 12, dtype=torch.int64)
        with igpt.use_kernels(built) as report:
            assert result(built, fake).shape == (2, 12, 16)
            assert report.calls("attention") == 2


def test_pruned_and_averaged(model: Any, tokens: Tensor) -> None:
    with igpt.use_kernels(model, match_hf_scale=True):
        for module in (model.transformer.ln_f, model.transformer.h[0].attn.c_attn):
            prune.l1_unstructured(module, "weight", 0.5)
        swapped = result(model, tokens)
    close(swapped, result(model, tokens))
    with igpt.use_kernels(model, match_hf_scale=True):
        for module in (model.transformer.ln_f, model.transformer.h[0].attn.c_attn):
            prune.remove(module, "weight")
        close(result(model, tokens), swapped)
        average = AveragedModel(model)
        average.update_parameters(model)
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(3)
        average.update_parameters(model)
        with igpt.use_kernels(model, **KERNELS_OFF):  # type: ignore[arg-type]
            model.transformer.ln_f.weight.data.mul_(2 / 3)
            close(result(average, tokens), result(model, tokens))


def test_saved_whole(model: Any, tokens: Tensor, tmp_path: Any) -> None:
    wanted, file = result(model, tokens), io.BytesIO()
    with igpt.use_kernels(model):
        torch.save(model, file)
        model.save_pretrained(tmp_path)
    file.seek(0)
    assert torch.equal(result(torch.load(file, weights_only=False), tokens), wanted)
    half = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    plain, exact = result(half, tokens), result(make().double(), tokens)
    with igpt.use_kernels(half, match_hf_scale=True):
        assert (result(half, tokens) - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("targets", [["c_attn", "c_proj", "c_fc"], ["c_attn", "wte", "lm_head"]], ids=str)
def test_adapters_that_come_and_go_while_swapped(tokens: Tensor, targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = make()
    before = result(model, tokens)
    settings = peft.LoraConfig(target_modules=targets, init_lora_weights=False, modules_to_save=["ln_f"])

    def both() -> list[Tensor]:
        weights = [one for one in adapted.parameters() if one.requires_grad]
        logits = result(adapted, tokens)
        return [logits, *torch.autograd.grad(logits.square().sum(), weights, allow_unused=True)]

    with igpt.use_kernels(model, match_hf_scale=True) as report:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.get_peft_model(model, settings).eval()
        found = both()
        assert report.calls("attention") == 2
        with igpt.use_kernels(adapted, **KERNELS_OFF):  # type: ignore[arg-type]
            wanted = both()
        assert (wanted[0] - before).abs().max() > 1e-2
        for actual, expected in zip(found, wanted, strict=True):
            close(actual, expected)
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(result(merged, tokens), wanted[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result(merged, tokens), wanted[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_exported_while_swapped(model: Any, tokens: Tensor) -> None:
    wanted = result(model, tokens)
    dynamic = {
        "input_ids": {0: torch.export.Dim("b", min=1, max=8), 1: torch.export.Dim("t", min=2, max=30)},
        "use_cache": None,
    }
    with igpt.use_kernels(model, match_hf_scale=True):
        program = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, dynamic_shapes=dynamic)
    assert any("igpt_kernels" in str(node.target) for node in program.graph.nodes)
    exported: Any = program.module()
    close(exported(input_ids=tokens, use_cache=False).logits, wanted)
    more = torch.randint(0, 16, (3, 17), generator=torch.Generator().manual_seed(1))
    close(exported(input_ids=more, use_cache=False).logits, result(model, more))
    assert torch.equal(result(model, tokens), wanted)
