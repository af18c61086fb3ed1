"""The Gluon kernel without a GPU: its results on threads, what the compiler makes of it, and which arguments it takes."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from igpt_kernels import testing, tuning
from igpt_kernels._triton import attention_forward
from igpt_kernels.reference import attention_reference
from igpt_kernels.tensors import empty_heads
from tests import gluon
from tools import speed

ROOT = Path(__file__).resolve().parents[3]
HAS_GLUON = attention_forward._gluon_launcher() is not None


def heads(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[B,H,T,D] of a fused projection."""
    batch, count, tokens, head_dim = shape
    return torch.zeros(batch, tokens, 3, count, head_dim, dtype=dtype)[:, :, 1].transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [(128, 128, 4, 2), (128, 64, 4, 3), (192, 64, 4, 2), (192, 64, 4, 3)], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "causal"),
    [
        (256, 256, 128, True), (333, 333, 64, True), (200, 500, 96, False), (1, 1, 64, True), (300, 100, 64, True),
        (130, 129, 64, True), (7, 700, 64, True), (400, 7, 64, False),
    ],
)  # fmt: skip
def test_its_source_on_threads(queries: int, keys: int, head_dim: int, causal: bool, entry: tuple[int, ...]) -> None:
    """Tiles, masks, the ring and its barriers: against the oracle in float64. See `tests.gluon` for what this cannot show."""
    kernel = gluon.load(ROOT / "igpt_kernels" / "_triton" / "attention_gluon.py")
    dtype = torch.float16 if entry[1] == 64 else torch.bfloat16
    q, k, v = (
        testing.make_input((2, 2, tokens, head_dim), dtype=dtype, seed=seed, memory="fused_qkv")
        for seed, tokens in enumerate((queries, keys, keys))
    )
    config, scale = tuning.Config(*entry, gluon=True), head_dim**-0.5
    with testing.GuardBands() as guards:
        out, lse = empty_heads(q, queries), torch.empty(2, 2, queries)
        out.fill_(math.nan)
        lse.fill_(math.nan)
        kernel.launch_flash_forward_gluon(q, k, v, out, lse, causal, scale, config)
    assert guards.check() >= 2
    eager, _ = attention_reference(q, k, v, causal=causal, scale=scale)
    exact, exact_lse = attention_reference(q.double(), k.double(), v.double(), causal=causal, scale=scale)
    unseen = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, unseen)
    assert (out.masked_select(unseen[..., None]) == 0).all()
    testing.error_ratio(out, exact, eager, factor=testing.OUTPUT_FACTOR)
    torch.testing.assert_close(lse.masked_fill(unseen, 0).double(), exact_lse.masked_fill(unseen, 0), rtol=1e-5, atol=1e-4)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_forward, "_capability", lambda device: (9, 0))


@pytest.mark.skipif(not HAS_GLUON, reason="this Triton has no Gluon")
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_it_takes(head_dim: int, dtype: torch.dtype, hopper: None) -> None:
    q, k, v = (heads(2, 3, 40, head_dim, dtype=dtype) for _ in range(3))
    assert attention_forward.gluon_takes(q, k, v)
    assert attention_forward.gluon_takes(q[:, :, :1], k[:, :1].contiguous(), v)


@pytest.mark.usefixtures("hopper")
def test_tensors_it_refuses() -> None:
    q = heads(2, 3, 40, 64)
    refused = {
        "float32": heads(2, 3, 40, 64, dtype=torch.float32),
        "head dim above 128": heads(2, 3, 40, 192),
        "head dim of 12": heads(2, 3, 40, 12),
        "nothing": q[:, :, :0],
        "last stride": torch.zeros(2, 3, 64, 40, dtype=torch.bfloat16).transpose(2, 3),
        "address": torch.zeros(2 * 3 * 40 * 64 + 8, dtype=torch.bfloat16)[1:-7].view(2, 3, 40, 64),
        "stride of 68": torch.zeros(2, 3, 40, 68, dtype=torch.bfloat16)[..., :64],
        "expanded": q[:1].expand(2, 3, 40, 64),
    }
    for what, x in refused.items():
        assert not attention_forward.gluon_takes(x, x, x), what
    for place in range(3):
        tensors = [q, q, q]
        tensors[place] = q.to(torch.float16)
        assert not attention_forward.gluon_takes(*tensors), "two dtypes"
        tensors[place] = refused["expanded"]
        assert not attention_forward.gluon_takes(*tensors), "each of the three is looked at"
    assert not attention_forward.gluon_takes(q, q[:, :, :0], q[:, :, :0]), "no keys"


def test_chips_and_versions_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    q = heads(2, 3, 40, 64)
    for capability in ((0, 0), (8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(attention_forward, "_capability", lambda device, found=capability: found)
        assert attention_forward.gluon_takes(q, q, q) == (capability == (9, 0) and HAS_GLUON)
    monkeypatch.setattr(attention_forward, "_capability", lambda device: (9, 0))
    for version in ("3.5.1", "2.9.0"):
        attention_forward._gluon_launcher.cache_clear()
        monkeypatch.setattr(attention_forward.triton, "__version__", version)
        assert not attention_forward.gluon_takes(q, q, q)
    monkeypatch.undo()
    attention_forward._gluon_launcher.cache_clear()
    assert (attention_forward._gluon_launcher() is not None) == HAS_GLUON


def test_what_stands_in_is_the_fastest_without_gluon() -> None:
    shipped = tuning.table("sm_90")["flash_forward"]["16"]
    for head_dim in (64, 256):
        assert attention_forward.without_gluon(head_dim) == shipped[str(head_dim)]
    for head_dim in (96, 128):
        rows = [row for row in speed.calibration()["rows"] if (row["kernel"], row["head_dim"]) == ("flash_forward", head_dim)]
        plain = [row for row in rows if not {"gluon", "descriptors"} & set(row["config"])]
        fastest = min(plain, key=lambda row: row["ms"])
        assert attention_forward.without_gluon(head_dim) == tuning.Config.read(fastest["config"])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GLUON, reason="this Triton has no Gluon")
def test_it_compiles_without_spills_and_multiplies_while_it_exponentiates() -> None:
    """In a process of its own: the audit puts a chip that is not here in place of Triton's driver."""
    assert importlib.util.find_spec("triton.experimental.gluon") is not None
    code = """
        import re
        from igpt_kernels.tuning import Config
        from tools import audit
        for size, config in ((128, Config(128, 128, 4, 2, gluon=True)), (64, Config(192, 64, 4, 3, gluon=True))):
            groups = config.block_m // 64
            (row,) = audit.audit("sm_90", "flash_forward", 16, size, config)
            assert row.kernel == "flash_forward_gluon" and not row.problems, row
            assert row.spills <= 4 * groups, row
            assert row.waits == 6 * groups, row  # before the loops, two in each of two loops, after them
            products = size // 16 + config.block_n // 16  # of a tile
            assert row.wgmma == 3 * products * groups, row
        with audit.compile_only("sm_90") as compiled:
            audit.launch("flash_forward", 128, audit.DTYPES[16], Config(128, 128, 4, 2, gluon=True), Config(64, 64, 4, 2))
        text = audit.disassemble(compiled[-1][1].asm["cubin"])
        # Products read their weights from registers until they are waited for. Nothing may write those before.
        reading, writes = set(), 0
        for line in re.findall(r"/\\*[0-9a-f]{4,5}\\*/\\s+(.*?);", text):
            product = re.match(r"HGMMA\\S+ R\\d+, R(\\d+), ", line)
            written = re.match(r"(?:@!?U?P\\d+ +)?(?:F|I|MUFU|MOV|SEL|SHFL|LD|LEA|LOP|PRMT)\\S* R(\\d+)", line)
            if product:
                reading |= set(range(int(product[1]), int(product[1]) + 4))
            elif "DEPBAR.LE gsb0, 0x0" in line:
                reading = set()
            elif written and reading:
                writes += 1
                assert int(written[1]) not in reading, line
        assert writes > 500, writes
        # In a loop: a wait for all but one product, the exponentials of a tile, a wait for all products.
        pieces = re.findall(r"WARPGROUP\\.DEPBAR\\.LE gsb0, (0x[01])|(MUFU\\.EX2)", text)
        last, between = "", 0
        for number, exponential in pieces:
            between = between + 1 if exponential else between
            if number == "0x0":
                assert last != "0x1" or between >= 64, between
            if number:
                last, between = number, 0
        gluon, other = Config(128, 64, 4, 2, gluon=True), Config(64, 64, 4, 2)
        for chip, head_dim in (("sm_90", 192), ("sm_80", 64)):  # no kernel for wide heads, and none for other chips
            with audit.compile_only(chip) as compiled:
                audit.launch("flash_forward", head_dim, audit.DTYPES[16], gluon, other)
            assert [name for name, _ in compiled] == ["flash_forward"], compiled
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
