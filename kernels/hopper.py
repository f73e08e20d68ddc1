"""What the Hopper kernels share: TMA descriptors, the tile scheduler of persistent programs, rings of shared-memory
buffers, the online softmax.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma, warpgroup_mma

# Triton 3.9 knows only the new names, 3.6 only the old ones.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
gather = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret

HALF = 64  # queries of one consumer warpgroup
BM = 2 * HALF
PIECE = 64  # keys, and columns, of the box that one TMA load copies
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
# Layout of per-row partial sums (64, 8): rows as WGMMA leaves them in registers, and of every 8 columns the sum that a
# thread holds.
PARTS: gl.constexpr = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0]], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
        block_bases=[], shape=[64, 8],
    )
)  # fmt: skip


@gluon.jit
def items_of_program(items):
    """Number of work items of this program under the static tile scheduler: item t is program_id + t * num_programs."""
    return (items - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)


@gluon.jit
def coordinates(item, first, second):
    """Coordinates (a, b, c) of a work item, where item = a + first * (b + second * c).

    The divisions are slow, so `next_coordinates` steps from one item to the next without them.
    """
    return item % first, item // first % second, item // first // second


@gluon.jit
def next_coordinates(a, b, c, step_a, step_b, step_c, first, second):
    """Coordinates of the program's next work item; the steps are the coordinates of item `num_programs`."""
    a += step_a
    carry = (a >= first).to(gl.int32)
    a -= carry * first
    b += step_b + carry
    carry = (b >= second).to(gl.int32)
    return a, b - carry * second, c + step_c + carry


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The next buffer of a ring of STAGES, and the phase (parity) of its barrier."""
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def wait_full(full, number, pred, STAGES: gl.constexpr):
    """Wait until the tile with the given running number has arrived in its buffer of the ring."""
    mbarrier.wait(full.index(number % STAGES), (number // STAGES) & 1, pred=pred)


@gluon.jit
def softmax(s, row_max, row_sum, scale_log2, BN: gl.constexpr):
    """One step of the online softmax over a tile of raw scores s (64, BN).

    Returns the weights (64, BN), the factor that rescales the accumulator, and the new running maximum (log2 units)
    and running sum.

    The running sum stays spread over 8 columns: `row_sum` (64, 8) has the layout PARTS, `row_max` (64,) that of its
    rows.
    """
    x = gl.convert_layout(gl.max(gl.reshape(s, [64, BN // 8, 8]), 1), PARTS, assert_trivial=True)  # in registers
    new = gl.maximum(row_max, gl.max(x, 1) * scale_log2)
    rescale = gl.exp2(row_max - new)
    shift = gl.convert_layout(new, gl.SliceLayout(1, s.type.layout), assert_trivial=True)
    w = gl.exp2(s * scale_log2 - shift[:, None])
    part = gl.convert_layout(gl.sum(gl.reshape(w, [64, BN // 8, 8]), 1), PARTS, assert_trivial=True)
    return w, rescale, new, row_sum * rescale[:, None] + part


@gluon.jit
def start_qk(q, keys, BN: gl.constexpr, S_L: gl.constexpr):
    """Issue the asynchronous WGMMA of 64 queries (64, D) with a key tile (BN, D); the token of its result (64, BN)."""
    zeros = gl.zeros([64, BN], gl.float32, S_L)
    return warpgroup_mma(q, keys.permute((1, 0)), zeros, use_acc=False, is_async=True)


def coordinate_steps(programs: int, first: int, second: int) -> tuple[int, int, int]:
    """Coordinates of item `programs`: the steps of `next_coordinates`."""
    return programs % first, programs // first % second, programs // first // second


@lru_cache(maxsize=64)
def shared_layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Shared-memory layout of a (rows, dim) tile that WGMMA reads."""
    return gl.NVMMASharedLayout.get_default_for([rows, dim], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def tma_view(x: Tensor) -> tuple[list[int], list[int], tuple[int, int, int, int]] | None:
    """A (B, H, n, d) tensor as the matrix of a TMA descriptor: shape, strides, and steps (y, x) per batch and head.

    None where the strides do not allow it: last dimension not contiguous, unaligned, or no common row length.
    """
    batch, heads, n, d = x.shape
    sb, sh, sn, sd = x.stride()
    size = x.element_size()
    if n == 1:
        sn = d
    if sd != 1 or x.data_ptr() % 16 or sn * size % 16 or sn < d:
        return None
    steps = []
    for count, stride in ((batch, sb), (heads, sh)):
        if count == 1:
            steps.append((0, 0))
        elif stride % sn == 0:
            steps.append((stride // sn, 0))
        elif stride + d <= sn:
            steps.append((0, stride))
        else:
            return None
    (yb, xb), (yh, xh) = steps
    rows = (batch - 1) * yb + (heads - 1) * yh + n
    columns = (batch - 1) * xb + (heads - 1) * xh + d
    if columns > sn or rows >= 2**31:
        return None
    return [rows, columns], [sn, 1], (yb, yh, xb, xh)
