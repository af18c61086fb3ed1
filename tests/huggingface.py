"""Hugging Face's ImageGPT for tests: small models, and what to compare of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
)

QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make(kind: Any = ImageGPTForCausalImageModeling, **changes: Any) -> Any:
    """A small model with gains and biases that are not those of a fresh one, in evaluation mode."""
    settings: dict[str, Any] = {"vocab_size": 17, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 3} | QUIET | changes
    torch.manual_seed(0)
    model = kind(ImageGPTConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("ln_" in name))
            else:
                parameter.mul_(4)  # so that attention is far from uniform
    return model.eval()


def result(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    output = model(input_ids=tokens, **options)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result(model, tokens).square().sum(), list(model.parameters()), allow_unused=True))


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    """Within float32 rounding of sums as large as the largest value."""
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, atol=3e-6 * max(1.0, float(expected.detach().abs().max())), rtol=1e-5)
