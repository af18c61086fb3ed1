"""What every differentiable operator must do, whatever it computes: one graph, the same bits, little kept in memory.

Values are another matter: see `tests.kit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint


def gradients(function: Callable[..., Any], arguments: Sequence[Any]) -> list[Tensor]:
    """Gradients of the sum of squares of all outputs, for the arguments that require one."""
    return list(torch.autograd.grad(_total(function(*arguments)), _leaves(arguments)))


def check_compiled(
    function: Callable[..., Any], calls: Iterable[Sequence[Any]], *, graphs: int = 2, dynamic: bool | None = True
) -> None:
    """Compile `function` without a graph break; its gradients must be those of the function itself.

    Args:
        function: gives a tensor, or several.
        calls: the arguments of each call, in order.
        graphs: how many graphs these calls may take: 2 is one forward and one backward graph for all of them.
        dynamic: as for `torch.compile`.
    """
    made = []

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        made.append(graph)
        return graph.forward

    def loss(*arguments: Any) -> Tensor:
        return _total(function(*arguments))

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=aot_autograd(fw_compiler=count))
    for arguments in calls:
        got = torch.autograd.grad(compiled(*arguments), _leaves(arguments))
        for a, b in zip(got, gradients(function, arguments), strict=True):
            torch.testing.assert_close(a, b)
    assert len(made) == graphs
    torch.compiler.reset()


def check_checkpointing(function: Callable[..., Any], arguments: Sequence[Any], *, reentrant: bool) -> None:
    """Inside `torch.utils.checkpoint` the gradients must be the same, bit for bit."""
    want = gradients(function, arguments)
    again = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
    _total(checkpoint(function, *again, use_reentrant=reentrant)).backward()
    for leaf, gradient in zip(_leaves(again), want, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


def check_same_bits(function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Five more runs must give the gradients of the first, bit for bit."""
    first = gradients(function, arguments)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(function, arguments), strict=True))


def check_side_stream(step: Callable[[], Sequence[Tensor]]) -> None:
    """On a CUDA stream that is not the current one, `step` must give the same bits."""
    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def kept_bytes(function: Callable[..., Any], arguments: Sequence[Tensor]) -> int:
    """Bytes that the graph keeps for the backward pass, beside the arguments."""
    mine = {x.data_ptr() for x in arguments}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in mine:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*arguments)
    assert out is not None  # alive until here, or what is kept would be freed and its memory used again
    return sum(saved.values())


def _leaves(arguments: Sequence[Any]) -> list[Tensor]:
    return [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]


def _total(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    several = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.stack([out.square().sum() for out in several]).sum()
