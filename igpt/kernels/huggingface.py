"""Hugging Face's ImageGPT modules, and what runs in place of their forward while a swap stands.

transformers is never imported here: its modules are known by their classes once other code has imported them. What is set
is one attribute of each instance, `forward`, which torch.compile guards. An instance's other methods and the class are not
followed on torch 2.11; it asks `igpt.kernels.state` on every call, and goes the original way whenever the kernel cannot run.

Known ways in which the port differs from Image GPT: sqrt(D) was truncated to an integer by transformers 5.17 (huggingface/
transformers#47468); each attention keeps its causal mask as a buffer of n_positions² bytes; norms compute in the dtype of
their input.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from igpt.kernels import state
from igpt_kernels.activation import quick_gelu
from igpt_kernels.attention import decode_attention, flash_attention
from igpt_kernels.norm import rms_norm

_MODELING = "transformers.models.imagegpt.modeling_imagegpt"
# Attributes of their modules that the forwards below read. If a release renames one, the swap says so instead of failing.
_READ = {
    "attention": (
        *("c_attn", "c_proj", "resid_dropout", "attn_dropout", "num_heads", "head_dim", "layer_idx", "bias"),
        *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "is_cross_attention"),
    ),
    "norm": ("weight", "eps"),
    "mlp": (),
    "model": (),
}


def _modeling() -> ModuleType | None:
    return sys.modules.get(_MODELING)


def find(model: nn.Module) -> dict[nn.Module, str]:
    """The modules of a Hugging Face ImageGPT inside `model`, wrapped as it may be, and the operation of each.

    "model": the ImageGPTModel, which builds the attention mask (see `_model`).
    """
    modeling = _modeling()
    if modeling is None:
        return {}
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, modeling.ImageGPTAttention):
            found[module] = "attention"
        elif isinstance(module, modeling.ImageGPTLayerNorm):
            found[module] = "norm"
        elif isinstance(module, modeling.ImageGPTMLP):
            found[module.act] = "mlp"
        elif isinstance(module, modeling.ImageGPTModel):
            found[module] = "model"
    return found


def setting_name(op: str) -> str:
    """The operation whose setting decides about modules of kind `op`."""
    return "attention" if op == "model" else op


def unsupported_reason(module: nn.Module, op: str) -> str:
    """Why a module keeps its own forward for good; empty when it need not."""
    missing = [name for name in _READ[op] if not hasattr(module, name)]
    if missing:
        version = getattr(sys.modules.get("transformers"), "__version__", "unknown")
        return f"transformers {version} has another {type(module).__name__} (no {', '.join(missing)})"
    if "forward" in vars(module) and not installed(module):
        return "something else has replaced its forward"
    if op == "attention" and module.is_cross_attention:
        return "cross attention keeps its own"
    if op == "mlp" and type(module).__name__ not in ("QuickGELUActivation",):
        return f"the activation is {type(module).__name__}, not quick_gelu"
    return ""


def truncates_scale(head_dim: int) -> bool:
    """Whether the port that is loaded divides scores by an integer instead of sqrt(D)."""
    modeling = _modeling()
    return modeling is not None and float(modeling.torch_float(head_dim**0.5)) != head_dim**0.5


class _Hooks:
    """What a swap sets on a module, kept between swaps: torch.compile finds its graphs again by these very objects."""

    def __init__(self, module: nn.Module, op: str) -> None:
        self.values = {
            "forward": functools.partial(_FORWARDS[op], module),
            "kernels_call": {"unpadded": False},
        }

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return type(None), ()  # copies and pickles of the module do not take it along


def installed(module: nn.Module) -> bool:
    """Whether a swap stands that has reached the module."""
    return hasattr(module, "kernels_users")


def install(module: nn.Module, op: str) -> None:
    """Let a module ask `igpt.kernels.state` on every call. Nothing else of it changes; a second call only counts."""
    if not installed(module):
        kept = vars(module).get("kernels_kept") or _Hooks(module, op)  # None in a copy
        values = kept.values | {"kernels": None, "kernels_users": 0, "kernels_kept": kept}
        for name, value in values.items():
            setattr(module, name, value)
    module.kernels_users += 1  # type: ignore[operator,assignment]


def share_call_state(modules: Mapping[nn.Module, str]) -> None:
    """Let the attentions of each installed ImageGPTModel learn from it whether a call is padded, see `_model`."""
    for model, op in modules.items():
        for inner in model.modules() if op == "model" else ():
            if modules.get(inner) == "attention":
                inner.kernels_call = model.kernels_call  # type: ignore[assignment]


def uninstall(module: nn.Module, op: str) -> None:
    """Undo one `install`; with the last one the module is as it was, but for what `_Hooks` holds out of its way.

    A `forward` that other code has put around ours stays: it calls ours, which then goes the original way.
    """
    module.kernels_users -= 1  # type: ignore[operator,assignment]
    if module.kernels_users == 0:
        if op == "attention":
            rebuild_mask(module)
        kept = module.kernels_kept
        wrapped = isinstance(kept, _Hooks) and vars(module).get("forward") is not kept.values["forward"]
        for name in ("kernels_users",) if wrapped else ("forward", "kernels", "kernels_users", "kernels_call"):
            delattr(module, name)


def free_mask(module: nn.Module) -> int:
    """Drop an attention's causal mask, which the kernels do not read; the bytes freed. `rebuild_mask` brings it back."""
    mask: Tensor = module.bias  # type: ignore[assignment]
    module.bias = mask.new_empty(0)
    return mask.numel() * mask.element_size()


def rebuild_mask(module: nn.Module) -> None:
    """Build the causal mask again, where it was dropped: [1,1,n_positions,n_positions], True where key <= query."""
    mask: Tensor = module.bias  # type: ignore[assignment]
    if mask.numel() == 0:
        positions: int = module.config.max_position_embeddings  # type: ignore[union-attr,assignment]
        module.bias = torch.ones(1, 1, positions, positions, dtype=torch.bool, device=mask.device).tril()


def _plain(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class."""
    return type(module).forward(module, *args, **kwargs)


def scale_of(module: Any, *, as_ported: bool) -> float:
    """The factor of an attention's scores; `as_ported` with the square root as the port computes it."""
    head_dim: int = module.head_dim
    root = float(head_dim**0.5)
    modeling = _modeling()
    if as_ported and modeling is not None and not module.reorder_and_upcast_attn:
        root = float(modeling.torch_float(root))
    scale = 1.0 / root if module.scale_attn_weights else 1.0
    return scale / (module.layer_idx + 1 if module.scale_attn_by_inverse_layer_idx else 1)


def _refusal(
    module: Any, attention_mask: Tensor | None, encoder_hidden_states: Tensor | None, output_attentions: bool | None
) -> str:
    """Why the kernel cannot run this call of an attention; empty when it can."""
    if encoder_hidden_states is not None:
        return "cross attention keeps its own"
    if output_attentions:
        return "output_attentions=True wants the weights, which are never made"
    if attention_mask is not None and not (torch.compiler.is_compiling() and module.kernels_call["unpadded"]):
        return "the batch is padded (attention_mask hides keys), or the cache is a static one"
    if module.training and module.attn_dropout.p > 0:
        return f"dropout of {module.attn_dropout.p} on the weights while training; Image GPT has none: set attn_pdrop=0"
    return ""


def _attention(
    module: Any,
    hidden_states: Tensor,
    layer_past: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = False,
    output_attentions: bool | None = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """ImageGPTAttention.forward by a kernel: hidden [B,T,C] -> ([B,T,C], no weights); the cache grows as in the original."""
    settings = state.settings_of(module)
    backend = settings["attention"]
    if backend is not None:
        reason = _refusal(module, attention_mask, encoder_hidden_states, output_attentions)
        if reason:
            state.refuse(settings, "attention", reason)
            backend = None
    if backend is None:
        rebuild_mask(module)
        return _plain(
            module, hidden_states, layer_past, attention_mask, encoder_hidden_states, encoder_attention_mask,
            use_cache=use_cache, output_attentions=output_attentions, **others,
        )  # fmt: skip
    state.count(settings, "attention")
    batch, tokens, width = hidden_states.shape
    q, k, v = module.c_attn(hidden_states).view(batch, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B,H,T,D]
    if layer_past is not None:
        cache = getattr(layer_past, "self_attention_cache", layer_past)
        k, v = cache.update(k, v, module.layer_idx)
    scale = scale_of(module, as_ported=settings["scale"] == "ported")
    if tokens == 1 and k.shape[2] > 1:
        y = decode_attention(q, k, v, k.shape[2], scale=scale, backend=backend)
    else:
        # Causal in the lower right corner, as their mask is cut: the last query stands at the last key.
        y = flash_attention(q, k, v, causal=True, scale=scale, backend=backend)
    return module.resid_dropout(module.c_proj(y.transpose(1, 2).reshape(batch, tokens, width))), None


def _norm(module: Any, tensor: Tensor) -> Tensor:
    """ImageGPTLayerNorm.forward by a kernel."""
    backend = state.active(module, "norm")
    if backend is None:
        return _plain(module, tensor)
    return rms_norm(tensor, module.weight, eps=module.eps, backend=backend)


def _activation(module: Any, input: Tensor) -> Tensor:
    """QuickGELUActivation.forward by a kernel."""
    backend = state.active(module, "mlp")
    return _plain(module, input) if backend is None else quick_gelu(input, backend=backend)


def _model(module: Any, *args: Any, **kwargs: Any) -> Any:
    """ImageGPTModel.forward as it is, but while torch.compile traces it tells the attentions when nothing is padded.

    There transformers makes a mask of zeros, which eager calls go without; nothing reads it then, and the compiler drops it.
    """
    mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
    if mask is not None or not torch.compiler.is_compiling():
        return _plain(module, *args, **kwargs)
    # True only inside of the trace, where it is a constant: what other calls of the model find is False.
    module.kernels_call["unpadded"] = True
    output = _plain(module, *args, **kwargs)
    module.kernels_call["unpadded"] = False
    return output


_FORWARDS: Mapping[str, Callable[..., Any]] = {"attention": _attention, "norm": _norm, "mlp": _activation, "model": _model}
