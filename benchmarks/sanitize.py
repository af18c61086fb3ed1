"""Small calls of every kernel: ``compute-sanitizer --tool memcheck python -m benchmarks.sanitize``.

Each shipped configuration of this GPU's table is launched once at odd sizes, so that the ends of tiles, rows and images are
in play. Exit code 0 says that the calls ran and gave finite numbers; what they touched is for the sanitizer to judge.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from igpt_kernels import layouts, tuning
from igpt_kernels.attention import block_sparse_attention, decode_attention, flash_attention
from igpt_kernels.fused import linear_cross_entropy, quick_gelu, rms_norm
from igpt_kernels.palette import PaletteTable, palette_lookup

DTYPES = {16: torch.bfloat16, 32: torch.float32}
ROOMS = ("attention", "sparse", "fused", "palette")


def sizes(kernel: str, bits: int) -> list[int]:
    """The sizes that the table of this GPU lists for a kernel."""
    return [int(size) for size in tuning.table(tuning.table_for(torch.device("cuda", 0)))[kernel][str(bits)]]


def attention(bits: int) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Forward, backward and decoding at 77 tokens, one call for each listed head dim."""
    for head_dim in sorted({*sizes("flash_forward", bits), *sizes("flash_backward_keys", bits), 96}):
        fused = torch.randn(1, 77, 3, 2, head_dim, device="cuda", dtype=DTYPES[bits])
        q, k, v = (fused[:, :, i].transpose(1, 2).detach().requires_grad_() for i in range(3))

        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> list[Tensor]:
            out = flash_attention(q, k, v, backend="triton")
            return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

        def decode(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> list[Tensor]:
            lengths = torch.full((1,), 70, device="cuda")
            return [decode_attention(q[:, :, -1:], k, v, lengths, backend="triton")]

        yield f"flash D={head_dim}", both
        yield f"decode D={head_dim}", decode


def sparse(bits: int) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Forward, backward and decoding of patterns on 11 x 13 pixels."""
    for head_dim in sorted({*sizes("sparse_forward", bits), *sizes("sparse_backward_keys", bits), 96}):
        fused = torch.randn(1, 143, 3, 2, head_dim, device="cuda", dtype=DTYPES[bits])
        q, k, v = (fused[:, :, i].transpose(1, 2).detach().requires_grad_() for i in range(3))
        for text in ("local2d:2", "row_column"):
            layout = layouts.parse(text, 11, 13)

            def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, layout: layouts.SparseLayout = layout) -> list[Tensor]:
                out = block_sparse_attention(q, k, v, layout, backend="triton")
                row = decode_attention(q[:, :, -1:], k, v, 143, layout=layout, backend="triton")
                return [out, row, *torch.autograd.grad(out.sum(), (q, k, v))]

            yield f"{text} D={head_dim}", both


def fused(bits: int) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Norm and activation at each listed width and one below it; the loss at each listed number of classes, and one below."""
    for width in sorted({size - odd for size in sizes("rms_norm_forward", bits) for odd in (0, 1)}):
        x, residual = (torch.randn(37, width, device="cuda", dtype=DTYPES[bits], requires_grad=True) for _ in range(2))
        weight = torch.randn(width, device="cuda", dtype=DTYPES[bits], requires_grad=True)

        def rows(x: Tensor = x, residual: Tensor = residual, weight: Tensor = weight) -> list[Tensor]:
            normed, summed = rms_norm(x, weight, residual=residual, backend="triton")
            out = quick_gelu(normed, bias=weight, backend="triton") + quick_gelu(summed, backend="triton")
            return [out, *torch.autograd.grad(out.sum(), (x, residual, weight))]

        yield f"norm, activation C={width}", rows
    for vocab in sorted(
        {size - odd for size in sizes("cross_entropy_forward", bits) for odd in (0, 1) if size <= 1024} | {512}
    ):
        hidden = torch.randn(77, 100, device="cuda", dtype=DTYPES[bits], requires_grad=True)
        matrix = torch.randn(vocab, 100, device="cuda", dtype=DTYPES[bits], requires_grad=True)
        target = torch.randint(vocab, (77,), device="cuda")

        def loss(hidden: Tensor = hidden, matrix: Tensor = matrix, target: Tensor = target) -> list[Tensor]:
            nats = linear_cross_entropy(hidden, matrix, target, backend="triton")
            return [nats, *torch.autograd.grad(nats, (hidden, matrix))]

        yield f"loss V={vocab}", loss


def palette(bits: int) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Table on the GPU, lookups in every output dtype, aligned and not."""
    table = PaletteTable(torch.rand(200, 3, dtype=torch.float64) * 255)
    pixels = torch.randint(0, 256, (1001, 3), dtype=torch.uint8, device="cuda")
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        for view in (pixels, pixels[1:], pixels[::2]):

            def lookup(view: Tensor = view, dtype: torch.dtype = dtype) -> list[Tensor]:
                return [palette_lookup(view, table, dtype=dtype)]

            yield f"palette {dtype}", lookup


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the calls; 1 if one gave a number that is not finite, 2 without a GPU."""
    parser = argparse.ArgumentParser(description="small calls of every kernel, to run under compute-sanitizer")
    parser.add_argument("rooms", nargs="*", help=f"of {', '.join(ROOMS)}; all when none is named")
    parser.add_argument("--bits", nargs="+", type=int, choices=list(DTYPES), default=list(DTYPES), help="of the values; both")
    parser.add_argument(
        "--at-once", action="store_true", help="a process for each room and width: fills Triton's cache quickly"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.rooms) - set(ROOMS):
        parser.error(f"rooms must be of {', '.join(ROOMS)}; got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("benchmarks.sanitize needs an NVIDIA GPU, and none is visible; `igpt info` tells why", file=sys.stderr)
        return 2
    chosen = [(room, bits) for room in options.rooms or ROOMS for bits in options.bits if room != "palette" or bits == 16]
    if options.at_once:
        command = [sys.executable, "-m", "benchmarks.sanitize"]
        children = [subprocess.Popen([*command, room, "--bits", str(bits)]) for room, bits in chosen]
        return max(child.wait() != 0 for child in children)
    torch.manual_seed(0)
    makers = {"attention": attention, "sparse": sparse, "fused": fused, "palette": palette}
    wrong = calls = 0
    for room, bits in chosen:
        for name, call in makers[room](bits):
            calls += 1
            if not all(bool(torch.isfinite(x.double()).all()) for x in call()):
                wrong += 1
                print(f"{name}, {bits} bits: not finite", flush=True)
    print(f"{calls} calls, {wrong} with numbers that are not finite")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
