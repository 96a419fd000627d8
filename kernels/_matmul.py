"""One tiled matrix product with fused epilogues, from which every two-layer op is built.

    C (M, N) = epilogue(A (M, K) @ B (K, N))       2 M N K FLOPs, (M K + K N + M N) itemsize bytes

Launch: one program per tile of C and per part of K, tiles in groups of GROUP rows of tiles so that
the programs in flight share their operands in L2. Sums are kept in float32 (float64 for float64),
products are exact (``input_precision="ieee"``: no TF32), and every sum has a fixed order: K is
split only into parts that a second kernel adds up in turn.

The epilogue, in this order, each step only where its operand is given:
    + bias, + or - residual, ReLU, ReLU's mask, squared error and its sum, in-place SGD update.
"""

import math

import triton
import triton.language as tl

from . import _tuned
from ._elementwise import float_from_bits, rounded, widen
from ._limits import Limits, limits, registers_for
from ._reduction import accumulator, finish
from ._registration import INTERPRETED, float_bits, loop_bound, wrap_triton
from ._tiling import Product

GROUP = tl.constexpr(8)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of this program's tile: GROUP rows of tiles at a time, column by column."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = program // per_group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + program % per_group % rows, program % per_group // rows


@triton.jit
def _epilogue(
    acc,
    program,
    rows,
    columns,
    M,
    N,
    out,
    out_row,
    out_column,
    bias,
    bias_stride,
    residual,
    residual_row,
    residual_column,
    mask,
    mask_row,
    mask_column,
    squared,
    loss,
    count,
    lr_bits,
    SUBTRACT: tl.constexpr,
    RELU: tl.constexpr,
):
    T: tl.constexpr = out.dtype.element_ty
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    if bias is not None:
        value = tl.load(bias + columns * bias_stride, mask=columns < N, other=0)
        acc += widen(value)[None, :]
    if residual is not None:
        offsets = rows[:, None] * residual_row + columns[None, :] * residual_column
        value = widen(tl.load(residual + offsets, mask=inside, other=0))
        acc = acc - value if SUBTRACT else acc + value
    if RELU:
        acc = tl.where(acc < 0, 0, acc)  # NaN stays
    if mask is not None:
        offsets = rows[:, None] * mask_row + columns[None, :] * mask_column
        acc = tl.where(widen(tl.load(mask + offsets, mask=inside, other=0)) <= 0, 0, acc)
    if squared is not None:
        offsets = rows[:, None] * N + columns[None, :]
        tl.store(squared + offsets, rounded(acc * acc, T), mask=inside)
    if loss is not None:
        # Flat: one axis after the other, Triton 3.6 fails to compile it for sm_100.
        errors = tl.reshape(tl.where(inside, acc * acc, 0), (acc.numel,))
        total = tl.sum(errors, 0) / count
        tl.store(loss + program, rounded(total, loss.dtype.element_ty))
    pointers = out + rows[:, None] * out_row + columns[None, :] * out_column
    if lr_bits is not None:
        lr = float_from_bits(lr_bits, acc.dtype)
        acc = widen(tl.load(pointers, mask=inside, other=0)) - lr * acc
    tl.store(pointers, rounded(acc, T), mask=inside)


def _stored_itemsize(specialised):
    """Of the sums over a part of K, or of the result."""
    split = specialised.constants.get("parts", "given") is not None
    return specialised.itemsize("parts" if split else "out")


def _matmul_limits(specialised):
    """One program on a multiprocessor at least, in what sm_80 has of shared memory (163 KiB a
    program): choose_tiling gives the large tiles all registers. Loads of aligned operands are as
    wide as VECTOR says, as far as the larger tile has so many elements for each thread (16 x 16
    float32 on 128 threads: 2); stores follow the layout of the sums in registers, so that a single
    element is all that is promised. (A tuned tiling is held to none of it: it was measured.)

    spill_bytes: two registers that are set aside before the loop over K cost nothing. Of the tile
    of 128 x 128 float32, which fills 128 registers a thread, Triton 3.8 for sm_100 sets aside a
    third and reads it again in each step, beside that step's 1024 multiply-adds.
    """
    itemsize, constants = specialised.itemsize("a"), specialised.constants
    largest = (constants["BLOCK_M"], constants["BLOCK_N"], itemsize) == (128, 128, 4)
    tile = max(constants["BLOCK_M"], constants["BLOCK_N"]) * constants["BLOCK_K"]
    vector = min(constants["VECTOR"], max(tile // specialised.threads, 1))
    return Limits(
        registers=registers_for(1, specialised.threads),
        load_bytes=itemsize * (vector if specialised.aligned("a", "b") else 1),
        store_bytes=_stored_itemsize(specialised),
        shared_bytes=163 * 1024,
        spill_bytes=16 if largest else 8,
    )


# steps: a single step would lose its loop, and float32's dot then keeps every operand in a register
# at once and spills (seen on sm_90: 4 KiB of stack per thread).
@limits(_matmul_limits)
@triton.jit(do_not_specialize=["lr_bits", "steps"])
def _matmul_kernel(
    a,
    b,
    stride_a,  # of the dimension that is not contiguous
    stride_b,
    M,
    N,
    K,
    steps,
    parts,  # (splits, M, N): sums over a part of K, or None and the epilogue is done here
    column_sums,  # (N,), or (splits, N) beside parts: of B, or None
    out,
    out_row,
    out_column,
    bias,
    bias_stride,
    residual,
    residual_row,
    residual_column,
    mask,
    mask_row,
    mask_column,
    squared,
    loss,
    count,
    lr_bits,
    SUBTRACT: tl.constexpr,
    RELU: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,  # M is the contiguous dimension of A, not K
    B_TRANSPOSED: tl.constexpr,  # K is the contiguous dimension of B, not N
    VECTOR: tl.constexpr,  # elements that one access may take in both operands
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    T: tl.constexpr = a.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    program = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _tile_of(program, M, N, BLOCK_M, BLOCK_N)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = part * steps * BLOCK_K + tl.arange(0, BLOCK_K)

    # VECTOR divides these, and so written the compiler sees it. Triton by itself looks for a factor
    # of 16 only, and would read rows of 100 floats one by one. A step over BLOCK_K of them may need
    # more than 32 bits where a stride does not.
    stride_a = stride_a // VECTOR * VECTOR
    stride_b = stride_b // VECTOR * VECTOR
    if A_TRANSPOSED:
        a_pointers = a + (rows[:, None] + inner[None, :] * stride_a)
        a_inside = rows[:, None] < M // VECTOR * VECTOR
        a_end = K
        a_step = BLOCK_K * tl.cast(stride_a, tl.int64)
    else:
        a_pointers = a + (rows[:, None] * stride_a + inner[None, :])
        a_inside = rows[:, None] < M
        a_end = K // VECTOR * VECTOR
        a_step = BLOCK_K
    if B_TRANSPOSED:
        b_pointers = b + (inner[:, None] + columns[None, :] * stride_b)
        b_inside = columns[None, :] < N
        b_end = K // VECTOR * VECTOR
        b_step = BLOCK_K
    else:
        b_pointers = b + (inner[:, None] * stride_b + columns[None, :])
        b_inside = columns[None, :] < N // VECTOR * VECTOR
        b_end = K
        b_step = BLOCK_K * tl.cast(stride_b, tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    if column_sums is not None:
        sums = tl.zeros((BLOCK_N,), ACC)
    for _ in range(loop_bound(steps)):
        a_tile = tl.load(a_pointers, mask=a_inside & (inner[None, :] < a_end), other=0)
        b_tile = tl.load(b_pointers, mask=b_inside & (inner[:, None] < b_end), other=0)
        if _INTERPRETED:
            # The interpreter multiplies the bits of bfloat16 as integers.
            a_tile = widen(a_tile)
            b_tile = widen(b_tile)
        acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee", out_dtype=ACC)
        if column_sums is not None:
            sums += tl.sum(widen(b_tile), 0)
        a_pointers += a_step
        b_pointers += b_step
        inner += BLOCK_K

    if column_sums is not None:
        if tile_m == 0:
            value = rounded(sums, column_sums.dtype.element_ty)
            tl.store(column_sums + part * N + columns, value, mask=columns < N)
    if parts is not None:
        offsets = (part * M + rows[:, None]) * N + columns[None, :]
        tl.store(parts + offsets, acc, mask=(rows[:, None] < M) & (columns[None, :] < N))
    else:
        _epilogue(
            acc,
            program,
            rows,
            columns,
            M,
            N,
            out,
            out_row,
            out_column,
            bias,
            bias_stride,
            residual,
            residual_row,
            residual_column,
            mask,
            mask_row,
            mask_column,
            squared,
            loss,
            count,
            lr_bits,
            SUBTRACT,
            RELU,
        )


def _add_parts_limits(specialised):
    """Few programs, each of which walks the parts of a tile: bandwidth is not what bounds them.

    spill_bytes: a mean in float64 ends in a division, whose subroutine for subnormal operands saves
    two registers around its call.
    """
    return Limits(
        registers=registers_for(1, specialised.threads),
        load_bytes=specialised.itemsize("parts"),
        store_bytes=specialised.itemsize("out"),
        shared_bytes=48 * 1024,
        spill_bytes=8 if specialised.itemsize("parts") == 8 else 0,
    )


@limits(_add_parts_limits)
@triton.jit(do_not_specialize=["lr_bits"])
def _add_parts_kernel(
    parts,
    splits,
    part_sums,
    column_sums,
    M,
    N,
    out,
    out_row,
    out_column,
    bias,
    bias_stride,
    residual,
    residual_row,
    residual_column,
    mask,
    mask_row,
    mask_column,
    squared,
    loss,
    count,
    lr_bits,
    SUBTRACT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the parts of a split K in their order, then the epilogue."""
    ACC: tl.constexpr = parts.dtype.element_ty
    program = tl.program_id(0)
    tile_m, tile_n = _tile_of(program, M, N, BLOCK_M, BLOCK_N)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < M) & (columns[None, :] < N)
    offsets = rows[:, None] * N + columns[None, :]
    size = tl.cast(M, tl.int64) * N
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for _ in range(loop_bound(splits)):
        acc += tl.load(parts + offsets, mask=inside, other=0)
        offsets += size
    if column_sums is not None:
        sums = tl.zeros((BLOCK_N,), ACC)
        sum_offsets = columns
        for _ in range(loop_bound(splits)):
            sums += tl.load(part_sums + sum_offsets, mask=columns < N, other=0)
            sum_offsets += N
        if tile_m == 0:
            value = rounded(sums, column_sums.dtype.element_ty)
            tl.store(column_sums + columns, value, mask=columns < N)
    _epilogue(
        acc,
        program,
        rows,
        columns,
        M,
        N,
        out,
        out_row,
        out_column,
        bias,
        bias_stride,
        residual,
        residual_row,
        residual_column,
        mask,
        mask_row,
        mask_column,
        squared,
        loss,
        count,
        lr_bits,
        SUBTRACT,
        RELU,
    )


def _operand(matrix):
    """(matrix, stride, transposed, contiguous extent) of an operand with a contiguous dimension.

    A matrix without one (a slice with a step, a number expanded to a matrix) is copied.
    """
    if matrix.stride(1) != 1 and matrix.stride(0) == 1:
        return matrix, matrix.stride(1), True, matrix.size(0)
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    return matrix, matrix.stride(0), False, matrix.size(1)


def _strides(matrix):
    return (0, 0) if matrix is None else matrix.stride()


def matmul(
    a,
    b,
    out,
    *,
    bias=None,
    relu=False,
    add=None,
    subtract=None,
    mask=None,
    squared=None,
    loss=None,
    count=1,
    column_sums=None,
    lr=None,
):
    """``out[:] = epilogue(a @ b)`` on the current stream; two-dimensional tensors of any strides.

    bias (N,): added to each row. add, subtract (M, N): added, subtracted. relu: negative values
    become 0. mask (M, N): the result is 0 where mask <= 0. squared (M, N, contiguous): receives
    the result's square. loss (0-d): receives sum(result^2) / count. column_sums (N,, contiguous):
    receives b's sums over K, if M and N are not 0. lr (a Python float): ``out -= lr * result``
    instead of ``out = result``.
    """
    # int: the tiles depend on the sizes, so torch.compile takes those for constants (tracing the
    # decisions with symbolic ones did not end within minutes).
    m, k, n = int(a.size(0)), int(a.size(1)), int(b.size(1))
    if m * n == 0:
        return
    a, stride_a, a_transposed, a_extent = _operand(a)
    b, stride_b, b_transposed, b_extent = _operand(b)
    residual = add if subtract is None else subtract
    does = {
        "bias": bias is not None,
        "add": add is not None,
        "subtract": subtract is not None,
        "relu": relu,
        "mask": mask is not None,
        "squared": squared is not None,
        "loss": loss is not None,
        "sums": column_sums is not None,
        "update": lr is not None,
    }
    product = Product(
        a.dtype,
        m,
        n,
        k,
        ("t" if a_transposed else "n") + ("t" if b_transposed else "n"),
        " ".join(filter(does.get, does)),
    )
    tiling = _tuned.tiling_of(product, a.device)
    tiles = triton.cdiv(m, tiling.block_m) * triton.cdiv(n, tiling.block_n)
    partial_losses = loss
    if loss is not None and tiles > 1:
        partial_losses = loss.new_empty(tiles, dtype=accumulator(loss.dtype))
    epilogue = (
        out,
        *_strides(out),
        bias,
        0 if bias is None else bias.stride(0),
        residual,
        *_strides(residual),
        mask,
        *_strides(mask),
        squared,
        partial_losses,
        1 if tiles > 1 else count,
        None if lr is None else float_bits(lr),
    )
    kinds = {"SUBTRACT": subtract is not None, "RELU": relu}
    parts, first_sums = None, column_sums
    if tiling.splits > 1:
        parts = a.new_empty((tiling.splits, m, n), dtype=accumulator(a.dtype))
        if column_sums is not None:
            first_sums = parts.new_empty((tiling.splits, n))
    wrap_triton(_matmul_kernel)[(tiles, tiling.splits)](
        a,
        b,
        stride_a,
        stride_b,
        m,
        n,
        k,
        triton.cdiv(triton.cdiv(k, tiling.block_k), tiling.splits),
        parts,
        first_sums,
        *epilogue,
        **kinds,
        A_TRANSPOSED=a_transposed,
        B_TRANSPOSED=b_transposed,
        VECTOR=math.gcd(16 // a.element_size(), stride_a, stride_b, a_extent, b_extent),
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=tiling.block_k,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if parts is not None:
        wrap_triton(_add_parts_kernel)[(tiles,)](
            parts,
            tiling.splits,
            first_sums,
            column_sums,
            m,
            n,
            *epilogue,
            **kinds,
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            num_warps=4,
        )
    if loss is not None and tiles > 1:
        finish(partial_losses, loss, count)
