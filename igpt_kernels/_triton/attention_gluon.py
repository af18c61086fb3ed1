"""Flash attention, forward, in Gluon for compute capability 9.0: one warp copies tiles, groups of four warps compute.

The copying warp (producer) fills a ring of tiles of K and V by the copy engine (TMA). Each group (consumer) owns 64 rows of
queries. It starts ``q·kᵀ`` of a tile and ``p·v`` of the tile before. It takes the softmax while ``p·v`` still runs.
Semantics are those of ``attention_forward._flash_forward_kernel``.

Triton's interpreter runs no Gluon. The kernel is compiled by the tests, and runs on a GPU only.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from igpt_kernels import tuning
from igpt_kernels._triton.common import ceil_div, heads_in_l2
from igpt_kernels._triton.launch import launch

LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
REGISTERS = {2: (240, 24), 3: (160, 32)}
"""Groups -> registers of a thread in a group, and in the producer. Together they fit the 65,536 of a multiprocessor."""


@gluon.jit
def place_tile(pid, tiles, heads, group):
    """The (tile, head) of a program, as `common.place_tile` gives it with the longest rows first."""
    section = pid // (group * tiles)
    first = section * group
    size = gl.minimum(group, heads - first)
    within = pid - first * tiles
    return tiles - 1 - within // size, first + within % size


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The next place in the ring; its barriers change phase at every turn."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def load(desc, batch, head, row, full, free, tiles, stage, phase):
    """Wait until every group has left a place in the ring, then copy a tile there. Rows beyond the tensor become 0."""
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, row, 0], full.index(stage), tiles.index(stage))


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
    batch, head, first, tiles, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the queries, then the keys and values of `tiles` tiles, the last one first; K is one tile ahead of V."""
    mbarrier.expect(q_full, q_desc.block_type.nbytes * GROUPS)
    for i in gl.static_range(GROUPS):
        tma.async_copy_global_to_shared(q_desc, [batch, head, first + i * 64, 0], q_full, q_tiles.index(i))
    row = (tiles - 1) * BN
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    load(k_desc, batch, head, row, k_full, k_free, k_tiles, stage, phase)
    for _ in range(1, tiles):
        next_stage, next_phase = following(stage, phase, STAGES)
        load(k_desc, batch, head, row - BN, k_full, k_free, k_tiles, next_stage, next_phase)
        load(v_desc, batch, head, row, v_full, v_free, v_tiles, stage, phase)
        row -= BN
        stage = next_stage
        phase = next_phase
    load(v_desc, batch, head, row, v_full, v_free, v_tiles, stage, phase)


@gluon.jit
def softmax(s, m, l, limit, cols, scale_log2, MASKED: gl.constexpr):  # noqa: E741
    """Take one tile of scores into the running softmax; see `attention_forward.softmax_step`."""
    if MASKED:
        s = gl.where(cols[None, :] <= limit[:, None], s * scale_log2, float("-inf"))
        m_new = gl.maximum(m, gl.max(s, 1))
        finite = gl.where(m_new == float("-inf"), 0.0, m_new)
        p = gl.exp2(s - finite[:, None])
        shrink = gl.exp2(m - finite)
    else:
        m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
        p = gl.exp2(s * scale_log2 - m_new[:, None])
        shrink = gl.exp2(m - m_new)
    return p, m_new, l * shrink + gl.sum(p, 1), shrink


@gluon.jit
def step(
    q, k_tiles, v_tiles, k_full, k_free, v_full, v_free, weights, acc, m, l, limit, cols, scale_log2,  # noqa: E741
    stage, phase,
    HD: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One tile of keys: its scores and softmax, and the values of the tile before, whose `weights` are known."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    zero = gl.zeros([64, BN], gl.float32, SCORES)
    next_stage, next_phase = following(stage, phase, STAGES)
    mbarrier.wait(k_full.index(next_stage), next_phase)
    k = k_tiles.index(next_stage).reshape((BN, HD)).permute((1, 0))
    scores = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    product = warpgroup_mma(weights, v_tiles.index(stage).reshape((BN, HD)), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_free.index(next_stage), count=1)
    p, m, l, shrink = softmax(s, m, l, limit, cols, scale_log2, MASKED)  # noqa: E741
    weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
    # The next step needs these values. Waiting for them here keeps ptxas from moving the wait for `product` before the
    # exponentials: it moves nothing across the loop of this wait.
    mbarrier.wait(v_full.index(next_stage), next_phase)
    acc = warpgroup_mma_wait(0, deps=(product,))
    mbarrier.arrive(v_free.index(stage), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    return weights, acc, m, l, next_stage, next_phase


@gluon.jit
def consume(
    out_desc, Lse, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
    batch, head, first, tiles, masked, H, Tq, Tk, offset, scale_log2,
    RANK: gl.constexpr, HD: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of 64 queries over `tiles` tiles of keys, the last one first; the first `masked` of them need a mask."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HD, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    q = q_tiles.index(RANK).reshape((64, HD))
    rows = first + RANK * 64 + gl.arange(0, 64, ROWS)
    cols = gl.arange(0, BN, gl.SliceLayout(0, SCORES))
    m = gl.full([64], float("-inf"), gl.float32, ROWS)
    l = gl.zeros([64], gl.float32, ROWS)  # noqa: E741
    acc = gl.zeros([64, HD], gl.float32, OUT)
    zero = gl.zeros([64, BN], gl.float32, SCORES)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)

    limit = gl.minimum(rows + offset, Tk - 1) - (tiles - 1) * BN  # the last column of the tile that a row sees
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q, k_tiles.index(0).reshape((BN, HD)).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_free.index(0), count=1)
    p, m, l, _ = softmax(s, m, l, limit, cols, scale_log2, True)  # noqa: E741
    weights = gl.convert_layout(p.to(q.dtype), WEIGHTS)
    mbarrier.wait(v_full.index(0), 0)
    for _ in range(1, masked):
        limit += BN
        weights, acc, m, l, stage, phase = step(  # noqa: E741
            q, k_tiles, v_tiles, k_full, k_free, v_full, v_free, weights, acc, m, l, limit, cols, scale_log2,
            stage, phase, HD, BN, STAGES, True,
        )  # fmt: skip
    for _ in range(masked, tiles):
        weights, acc, m, l, stage, phase = step(  # noqa: E741
            q, k_tiles, v_tiles, k_full, k_free, v_full, v_free, weights, acc, m, l, limit, cols, scale_log2,
            stage, phase, HD, BN, STAGES, False,
        )  # fmt: skip
    product = warpgroup_mma(weights, v_tiles.index(stage).reshape((BN, HD)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(product,))

    # l == 0 exactly for fully masked rows; NaN propagates.
    lse = gl.where(l == 0, float("-inf"), (m + gl.log2(l)) * LN2)
    gl.store(Lse + (batch.to(gl.int64) * H + head) * Tq + rows, lse, mask=rows < Tq)
    inverse = gl.convert_layout(gl.where(l == 0, 0.0, 1.0 / l), gl.SliceLayout(1, OUT))[:, None]
    acc = gl.where(inverse == 0, 0.0, acc * inverse)
    # This group has read its queries, so the output takes their place on the way to memory.
    q.store(acc.to(q.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [batch, head, first + RANK * 64, 0], q_tiles.index(RANK))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "H", "Tq", "Tk", "offset", "group"])
def _flash_forward_gluon_kernel(
    q_desc, k_desc, v_desc, out_desc, Lse,  # tiles [1,1,rows,HD] of q, out [B,H,Tq,D] and k, v [B,H,Tk,D]; lse [B,H,Tq]
    heads, H, Tq, Tk, offset, group, scale_log2,
    HD: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    GROUP_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One tile of 64 * GROUPS queries of one head. Query i sees key j when j <= i + offset; full attention is offset = Tk."""
    BM: gl.constexpr = 64 * GROUPS
    tile, index = place_tile(gl.program_id(0), (Tq + BM - 1) // BM, heads, group)
    batch = index // H
    head = index % H
    first = tile * BM
    # Producer and groups go through the same tiles. There is always one: rows that see no key mask all of it.
    full = gl.minimum(gl.maximum(first + offset + 1, 0), Tk) // BN
    end = gl.minimum(gl.maximum(gl.minimum(first + BM, Tq) + offset, 0), Tk)
    tiles = gl.maximum((end + BN - 1) // BN, 1)
    masked = gl.maximum(tiles - full, 1)

    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [4 if GROUPS == 3 else GROUPS, 1, 1, 64, HD], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, HD], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, HD], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()

    if GROUPS == 2:
        gl.warp_specialize([
            (consume, (out_desc, Lse, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                batch, head, first, tiles, masked, H, Tq, Tk, offset, scale_log2, 0, HD, BN, STAGES)),
            (consume, (out_desc, Lse, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                batch, head, first, tiles, masked, H, Tq, Tk, offset, scale_log2, 1, HD, BN, STAGES)),
            (produce, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                batch, head, first, tiles, BN, GROUPS, STAGES)),
        ], [4, 1], [GROUP_REGISTERS, COPY_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (out_desc, Lse, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                batch, head, first, tiles, masked, H, Tq, Tk, offset, scale_log2, 0, HD, BN, STAGES)),
            (consume, (out_desc, Lse, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                batch, head, first, tiles, masked, H, Tq, Tk, offset, scale_log2, 1, HD, BN, STAGES)),
            (consume, (out_desc, Lse, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                batch, head, first, tiles, masked, H, Tq, Tk, offset, scale_log2, 2, HD, BN, STAGES)),
            (produce, (q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, k_full, k_free, v_full, v_free,
                batch, head, first, tiles, BN, GROUPS, STAGES)),
        ], [4, 4, 1], [GROUP_REGISTERS, GROUP_REGISTERS, COPY_REGISTERS])  # fmt: skip


def launch_flash_forward_gluon(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    config: tuning.Config,
) -> None:
    """Fill `out` and `lse`, for arguments that `attention_forward.gluon_takes` lets through.

    Args:
        q: [B,H,Tq,D] float16 or bfloat16, D <= 128.
        k: [B,H,Tk,D].
        v: [B,H,Tk,D].
        out: [B,H,Tq,D] in memory [B,Tq,H,D], dtype of q.
        lse: [B,H,Tq] float32, contiguous.
        causal: query i sees key j when ``j <= i + Tk - Tq``.
        scale: factor of the scores, not negative.
        config: with ``gluon``: block_m is 64 rows for each group, num_stages the places of the ring.
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    width = 64 if head_dim <= 64 else 128
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    groups = config.block_m // 64
    group_registers, copy_registers = REGISTERS[groups]

    def tiles(x: Tensor, rows: int) -> TensorDescriptor:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width], layout)

    launch(
        _flash_forward_gluon_kernel, (ceil_div(queries, config.block_m) * batch * heads,),
        tiles(q, 64), tiles(k, config.block_n), tiles(v, config.block_n), tiles(out, 64), lse,
        batch * heads, heads, queries, keys, keys - queries if causal else keys,
        heads_in_l2(batch * heads, keys, head_dim, q.element_size()), scale * LOG2E,
        HD=width, BN=config.block_n, GROUPS=groups, STAGES=config.num_stages,
        GROUP_REGISTERS=group_registers, COPY_REGISTERS=copy_registers, num_warps=config.num_warps,
    )  # fmt: skip
