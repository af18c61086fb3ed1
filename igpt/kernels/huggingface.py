"""Hugging Face's ImageGPT modules, and what runs in place of their methods while a swap stands.

transformers is never imported here: its modules are known by their classes once other code has imported them. Their methods ask
`igpt.kernels.state` on every call, and go the original way whenever the kernel cannot run. `igpt.kernels.classes` has the way
in which methods are replaced.

Known ways in which the port differs from Image GPT: sqrt(D) was truncated to an integer by transformers 5.17 (huggingface/
transformers#47468); each attention keeps its causal mask as a buffer of n_positions² bytes; norms compute in the dtype of
their input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from igpt.kernels import classes, state
from igpt_kernels.activation import quick_gelu
from igpt_kernels.attention import decode_attention, flash_attention
from igpt_kernels.norm import rms_norm

_MODELING = "transformers.models.imagegpt.modeling_imagegpt"
_ACTIVATIONS = "transformers.activations"
# Attributes of their modules that are read here. If a release renames one, the swap says so instead of failing.
_READ = {
    "attention": (
        *("attn_dropout", "head_dim", "layer_idx", "bias", "is_cross_attention"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"),
    ),
    "norm": ("weight", "eps"),
    "mlp": (),
    "model": ("config", "h"),
}
# Where the modules are of which an ImageGPTModel is made, and their operation.
_PARTS = {"ln_1": "norm", "attn": "attention", "ln_2": "norm", "crossattention": "attention", "ln_cross_attn": "norm"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_UNPADDED: Any = ()
"""A value of `output_attentions` by which ImageGPTModel tells its attentions that nothing is padded, see `_model`."""


def _modeling() -> ModuleType | None:
    return sys.modules.get(_MODELING)


def find(model: nn.Module) -> dict[nn.Module, str]:
    """The modules of a Hugging Face ImageGPT inside `model`, wrapped as it may be, and the operation of each.

    "model": the ImageGPTModel, which builds the attention mask (see `_model`). What stands in the place of a module of theirs
    is found too: `unsupported_reason` then says what it is.
    """
    modeling = _modeling()
    if modeling is None:
        return {}
    known = {"attention": modeling.ImageGPTAttention, "norm": modeling.ImageGPTLayerNorm}
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        op = next((op for op, kind in known.items() if isinstance(module, kind)), None)
        if op is not None:
            found[module] = op
        elif isinstance(module, modeling.ImageGPTMLP):
            act = getattr(module, "act", None)
            found[act if isinstance(act, nn.Module) else module] = "mlp"
        elif isinstance(module, (modeling.ImageGPTModel, modeling.ImageGPTBlock)):
            if isinstance(module, modeling.ImageGPTModel):
                found[module] = "model"
            for name, part in {**_PARTS, "ln_f": "norm"}.items():
                there = getattr(module, name, None)
                if isinstance(there, nn.Module) and not any(isinstance(inner, known[part]) for inner in there.modules()):
                    found[there] = part
    return found


def setting_name(op: str) -> str:
    """The operation whose setting decides about modules of kind `op`."""
    return "attention" if op == "model" else op


def unsupported_reason(module: nn.Module, op: str) -> str:
    """Why a module keeps its own methods for good; empty when it need not."""
    place, kind = _PLACES[op]
    theirs = getattr(sys.modules.get(place), kind, None)
    if theirs is None or not isinstance(module, theirs):
        if op != "mlp":
            return f"{type(module).__name__} stands in the place of {kind}"
        act = getattr(module, "act", module)
        name = type(act).__name__ if isinstance(act, nn.Module) else repr(act)
        return f"the activation is {name}, not quick_gelu of transformers"
    missing = [name for name in _READ[op] if not hasattr(module, name)]
    if missing:
        version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
        return f"transformers {version} has another {type(module).__name__} (no {', '.join(missing)})"
    if classes.installed(module):
        return ""
    for name in _METHODS[op]:
        if name in vars(module) and not _is_bound_method(module, name):
            return f"something else has replaced its {name}"
        if not _is_own(getattr(type(module), name, None), place, f"{kind}.{name}"):
            return _whose(type(module), theirs, name)
    if parametrize.is_parametrized(module):
        return f"{', '.join(vars(module)['_modules']['parametrizations'])} is parametrized"  # by a class for this module alone
    if op == "attention":
        return "cross attention keeps its own" if module.is_cross_attention else _other_future(module)
    return _other_masks(module) if op == "model" else ""


def _is_bound_method(module: nn.Module, name: str) -> bool:
    """Whether an attribute of the instance is the method of its class. accelerate leaves that when it takes a hook off."""
    value = vars(module)[name]
    own = getattr(type(module), name, None)
    function = getattr(value, "__func__", None)
    return getattr(value, "__self__", None) is module and (function is own or getattr(function, "__wrapped__", None) is own)


def _is_own(function: Any, place: str, name: str) -> bool:
    """Whether a method is the one that transformers defines, in its own decorators if it has any."""
    while hasattr(function, "__wrapped__"):
        if not str(getattr(function, "__globals__", {}).get("__name__")).startswith("transformers."):
            return False
        function = function.__wrapped__
    return getattr(function, "__globals__", {}).get("__name__") == place and function.__qualname__ == name


def _whose(kind: type, theirs: type, name: str) -> str:
    """Who has given a class another method than transformers."""
    for one in kind.__mro__:
        if name in vars(one) and one is not theirs and issubclass(one, theirs):
            return f"{one.__name__} has a {name} of its own"
    return f"{theirs.__name__}.{name} has been patched"


def _other_future(attention: Any) -> str:
    """Why the causal mask of an attention is not that of the kernel, as far as it has values."""
    mask, positions = attention.bias, attention.config.max_position_embeddings
    if type(mask) is not Tensor or mask.is_meta:
        return ""
    usual = torch.ones((1, 1, positions, positions), dtype=torch.bool, device=mask.device).tril()
    return "" if torch.equal(mask, usual) else "its causal mask (the buffer bias) is not the one of transformers"


def _other_masks(model: Any) -> str:
    """Why a mask that attentions are given may hide more than padding and the future, in the blocks of an ImageGPTModel."""
    modeling = _modeling()
    for block in model.h:
        if not isinstance(block, modeling.ImageGPTBlock) or "forward" in vars(block):  # type: ignore[union-attr]
            return f"{type(block).__name__} may have a mask of its own, so compiled graphs run as plain PyTorch"
        if not _is_own(type(block).forward, _MODELING, "ImageGPTBlock.forward"):
            return f"{type(block).__name__}.forward may have a mask of its own, so compiled graphs run as plain PyTorch"
    for name in ("create_causal_mask", "create_bidirectional_mask"):
        # Release 5.0 has neither: there only padding makes a mask.
        if hasattr(modeling, name) and not _is_own(getattr(modeling, name), "transformers.masking_utils", name):
            return f"{name} has been patched, so compiled graphs run as plain PyTorch"
    return ""


def truncates_scale(head_dim: int) -> bool:
    """Whether the port that is loaded divides scores by an integer instead of sqrt(D)."""
    modeling = _modeling()
    return modeling is not None and float(modeling.torch_float(head_dim**0.5)) != head_dim**0.5


def install(module: nn.Module, op: str) -> None:
    """Let a module ask `igpt.kernels.state` on every call. Nothing else of it changes; a second call does nothing."""
    for name in _METHODS[op]:
        if name in vars(module) and not classes.installed(module):
            delattr(module, name)  # the method of its class, see `_is_bound_method`
    classes.install(module, _METHODS[op])


def share_masks(attentions: Iterable[nn.Module]) -> int:
    """Let attentions whose kernels read no causal mask share one; the bytes that this frees.

    Shared, not dropped: calls that go the original way read it, and so do copies and averages of the model.
    """
    freed, first = 0, dict[tuple[object, ...], Tensor]()
    for module in attentions:
        mask: Tensor = module.bias  # type: ignore[assignment]
        shared = first.setdefault((type(mask), mask.device, mask.shape, mask.dtype), mask)
        if shared is not mask:
            module.bias = shared
            module.kernels_shared = True  # type: ignore[assignment]
            freed += mask.numel() * mask.element_size()
    return freed


def uninstall(module: nn.Module) -> None:
    """Undo `install` and `share_masks`, once no swap stands that reaches the module."""
    if vars(module).pop("kernels_shared", False) and not torch._C._len_torch_dispatch_stack():
        with torch.inference_mode(False):
            own = module.bias.clone()  # type: ignore[operator,union-attr]
        if not torch._C._functorch.is_functorch_wrapped_tensor(own):  # neither a mode's nor a transform's may stay behind
            module.bias = own
    classes.uninstall(module)


def scale_of(module: Any, *, as_ported: bool) -> float:
    """The factor of an attention's scores; `as_ported` with the square root as the port computes it."""
    head_dim: int = module.head_dim
    root = float(head_dim**0.5)
    modeling = _modeling()
    if as_ported and modeling is not None and not module.reorder_and_upcast_attn:
        root = float(modeling.torch_float(root))
    scale = 1.0 / root if module.scale_attn_weights else 1.0
    return scale / (module.layer_idx + 1 if module.scale_attn_by_inverse_layer_idx else 1)


def _settings(module: Any, op: str, refusal: str) -> state.Settings | None:
    """The settings by which a call of `op` runs, or None for plain PyTorch: they say so, or there is a `refusal`."""
    settings = classes.settings_of(module)
    if settings[op] is None:
        return None
    reason = classes.changed(module) or refusal
    if reason:
        state.refuse(settings, op, reason)
        return None
    return settings


def _foreign(x: Tensor, weight: Tensor | None = None) -> str:
    """Why a kernel cannot take such tensors; empty when it can. Their own code decides what a subclass computes."""
    alike = weight is None or (type(weight) is nn.Parameter and weight.dtype == x.dtype)
    if alike and type(x) is Tensor and x.dtype in _FLOATS:
        return ""  # most calls: the rest would take a microsecond of each
    for one in (x,) if weight is None else (x, weight):
        if type(one) not in (Tensor, nn.Parameter) and not isinstance(one, FakeTensor):
            return f"a tensor is a {type(one).__name__}"
        if one.dtype not in _FLOATS:
            return f"a tensor is of {one.dtype}"
    if weight is not None and (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        return "float64 and another dtype meet"
    return ""


class _Kernel(NamedTuple):
    """What an attention runs in place of its scores; given to it as its `attention_mask`, so each call has its own."""

    backend: str
    scale: float


def _refusal(
    module: Any,
    hidden_states: Tensor,
    layer_past: Any,
    attention_mask: Tensor | None,
    encoder_hidden_states: Tensor | None,
    output_attentions: Any,
    head_mask: Tensor | None,
) -> str:
    """Why the kernel cannot run this call of an attention; empty when it can."""
    if encoder_hidden_states is not None:
        return "cross attention keeps its own"
    if output_attentions:
        return "output_attentions=True wants the weights, which are never made"
    if head_mask is not None:
        return "head_mask weighs heads"
    unpadded = isinstance(output_attentions, tuple) and _grows(module, layer_past)
    if attention_mask is not None and not unpadded:
        return "the batch is padded (attention_mask hides keys), or the cache is a static one"
    dropout = module.attn_dropout
    if type(dropout) not in (nn.Dropout, nn.Identity) or dropout._forward_hooks or dropout._forward_pre_hooks:
        return f"what is done to the weights would be left out (a {type(dropout).__name__}, or hooks on it)"
    if dropout.training and getattr(dropout, "p", 0) > 0:
        return f"dropout of {dropout.p} on the weights while training; Image GPT has none: set attn_pdrop=0"
    return _foreign(hidden_states)


def _grows(module: Any, layer_past: Any) -> bool:
    """Whether a cache gives exactly the keys that were put into it: there is none, or it is a DynamicCache of full layers."""
    if layer_past is None:
        return True
    cache = getattr(layer_past, "self_attention_cache", layer_past)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return False
    full = getattr(sys.modules.get("transformers.cache_utils"), "DynamicLayer", None)
    there = len(layers) > module.layer_idx
    return full is not None and (type(layers[module.layer_idx]) if there else cache.layer_class_to_replicate) is full


def _attention(
    plain: Any,
    module: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = False,
    output_attentions: Any = False,
    **others: Any,
) -> Any:
    """ImageGPTAttention.forward: projections and cache are its own, and what it does with scores is `_weighted`."""
    refusal = _refusal(
        module, hidden_states, layer_past, attention_mask, encoder_hidden_states, output_attentions, others.get("head_mask")
    )
    settings = _settings(module, "attention", refusal)

    mask: Any = attention_mask
    if settings is not None:
        state.count(settings, "attention")
        mask = _Kernel(str(settings["attention"]), scale_of(module, as_ported=settings["scale"] == "ported"))
    return plain(
        module, hidden_states, layer_past, mask, encoder_hidden_states, encoder_attention_mask,
        use_cache=use_cache, output_attentions=output_attentions, **others,
    )  # fmt: skip


def _weighted(
    plain: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *others: Any
) -> tuple[Tensor, Tensor | None]:
    """ImageGPTAttention._attn: queries [B,H,T,D] against keys and values -> [B,H,T,D], and no weights."""
    if not isinstance(attention_mask, _Kernel):
        return plain(module, query, key, value, attention_mask, *others)  # type: ignore[no-any-return]
    backend, scale = attention_mask.backend, attention_mask.scale
    if query.shape[2] == 1 and key.shape[2] > 1:
        return decode_attention(query, key, value, key.shape[2], scale=scale, backend=backend), None
    # Causal in the lower right corner, as their mask is cut: the last query stands at the last key.
    return flash_attention(query, key, value, causal=True, scale=scale, backend=backend), None


def _norm(plain: Any, module: Any, tensor: Tensor) -> Tensor:
    """ImageGPTLayerNorm.forward by a kernel."""
    weight = module.weight
    refusal = _foreign(tensor, weight)
    if weight.shape != tensor.shape[-1:]:
        refusal = f"the weight is {list(weight.shape)}, not one row"
    elif not isinstance(module.eps, (int, float)) or not 0 <= module.eps < math.inf:
        refusal = f"eps is {module.eps!r}, not a number from 0 on"
    settings = _settings(module, "norm", refusal)
    if settings is None:
        return plain(module, tensor)  # type: ignore[no-any-return]
    state.count(settings, "norm")
    return rms_norm(tensor, weight, eps=module.eps, backend=str(settings["norm"]))


def _activation(plain: Any, module: Any, input: Tensor) -> Tensor:
    """QuickGELUActivation.forward by a kernel."""
    settings = _settings(module, "mlp", _foreign(input))
    if settings is None:
        return plain(module, input)  # type: ignore[no-any-return]
    state.count(settings, "mlp")
    return quick_gelu(input, backend=str(settings["mlp"]))


def _model(plain: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    """ImageGPTModel.forward as it is, but it tells the attentions where nothing is padded.

    transformers makes a mask there too: of zeros while torch.compile traces, of the future alone with `is_decoder`. Each block
    gets `output_attentions` as it was given. So a value of it that is false like False says so, and only for this very call.
    """
    wanted = kwargs.get("output_attentions")
    wanted = module.config.output_attentions if wanted is None else wanted
    told = len(args) > 2 or any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids"))
    if not wanted and len(args) < 10:
        kwargs["output_attentions"] = False if told or module.config._attn_implementation != "eager" else _UNPADDED
    return plain(module, *args, **kwargs)


_PLACES = {
    "attention": (_MODELING, "ImageGPTAttention"),
    "norm": (_MODELING, "ImageGPTLayerNorm"),
    "mlp": (_ACTIVATIONS, "QuickGELUActivation"),
    "model": (_MODELING, "ImageGPTModel"),
}
_METHODS: Mapping[str, Mapping[str, classes.Method]] = {
    "attention": {"forward": _attention, "_attn": _weighted, "_upcast_and_reordered_attn": _weighted},
    "norm": {"forward": _norm},
    "mlp": {"forward": _activation},
    "model": {"forward": _model},
}
