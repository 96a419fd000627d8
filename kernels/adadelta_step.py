"""One step of Adadelta in Triton, in place, in one pass:

    g           = grad + weight_decay * param
    square_avg  = rho * square_avg + (1 - rho) * g^2
    delta       = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
    acc_delta   = rho * acc_delta + (1 - rho) * delta^2
    param      -= lr * delta

Bytes: reads 4 n itemsize, writes 3 n itemsize. Launch: as in relu.py. Roots and quotients are those
of IEEE 754: Triton's plain ones are approximate for float32.
"""

import torch
import triton
import triton.language as tl

from ._elementwise import (
    WARPS,
    block_size,
    elementwise_limits,
    float_from_bits,
    laid_out_like,
    part_of,
    rounded,
    widen,
)
from ._limits import limits
from ._registration import (
    expect,
    expect_floating,
    float_bits,
    loop_bound,
    raw_op,
    wrap_triton,
)


@triton.jit
def _sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _quotient(x, y):
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _step(
    param,
    grad,
    square_avg,
    acc_delta,
    lr,
    rho,
    one_less_rho,
    eps,
    weight_decay,
    offsets,
    inside,
):
    """The step of the elements at ``offsets``, computed in the type that sums are kept in."""
    dtype: tl.constexpr = param.dtype.element_ty
    p = widen(tl.load(param + offsets, mask=inside))
    g = widen(tl.load(grad + offsets, mask=inside))
    mean_square = widen(tl.load(square_avg + offsets, mask=inside))
    acc = widen(tl.load(acc_delta + offsets, mask=inside))
    if weight_decay is not None:  # without decay nothing of param may reach g: 0 * inf is NaN
        g += float_from_bits(weight_decay, p.dtype) * p
    rho = float_from_bits(rho, p.dtype)
    one_less_rho = float_from_bits(one_less_rho, p.dtype)
    eps = float_from_bits(eps, p.dtype)
    mean_square = rho * mean_square + one_less_rho * (g * g)
    delta = _quotient(_sqrt(acc + eps), _sqrt(mean_square + eps)) * g
    acc = rho * acc + one_less_rho * (delta * delta)
    p -= float_from_bits(lr, p.dtype) * delta
    tl.store(param + offsets, rounded(p, dtype), mask=inside)
    tl.store(square_avg + offsets, rounded(mean_square, dtype), mask=inside)
    tl.store(acc_delta + offsets, rounded(acc, dtype), mask=inside)


@limits(
    lambda specialised: elementwise_limits(
        specialised, ["param", "grad", "square_avg", "acc_delta"], "param"
    )
)
@triton.jit
def _adadelta_step_kernel(
    param,
    grad,
    square_avg,
    acc_delta,
    n,
    lr,
    rho,
    one_less_rho,
    eps,
    weight_decay,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # A mask that ends inside a 16-byte access would split them all: only the last tile has one.
    if start + BLOCK <= n:
        _step(
            param,
            grad,
            square_avg,
            acc_delta,
            lr,
            rho,
            one_less_rho,
            eps,
            weight_decay,
            start + tl.arange(0, BLOCK),
            None,
        )
    else:
        PART: tl.constexpr = part_of(BLOCK)
        for first in range(0, loop_bound(n - start), PART):
            offsets = start + first + tl.arange(0, PART)
            _step(
                param,
                grad,
                square_avg,
                acc_delta,
                lr,
                rho,
                one_less_rho,
                eps,
                weight_decay,
                offsets,
                offsets < n,
            )


@raw_op(
    "(Tensor(a!) param, Tensor grad, Tensor(b!) square_avg, Tensor(c!) acc_delta, float lr, "
    "float rho, float eps, float weight_decay) -> ()"
)
def adadelta_step(param, grad, square_avg, acc_delta, lr, rho, eps, weight_decay):
    expect_floating("param", param)
    for name, each in (("grad", grad), ("square_avg", square_avg), ("acc_delta", acc_delta)):
        expect(name, each, param.shape, like=param)
    n = param.numel()
    if not n:
        return
    run = param if param.is_contiguous() else laid_out_like(torch.empty_like(param), param)
    square_avg_run, acc_delta_run = laid_out_like(run, square_avg), laid_out_like(run, acc_delta)
    block = block_size(n, param.element_size())
    wrap_triton(_adadelta_step_kernel)[(triton.cdiv(n, block),)](
        run,
        laid_out_like(run, grad),
        square_avg_run,
        acc_delta_run,
        n,
        float_bits(lr),
        float_bits(rho),
        float_bits(1 - rho),
        float_bits(eps),
        float_bits(weight_decay) if weight_decay else None,
        BLOCK=block,
        num_warps=WARPS,
    )
    updated = ((param, run), (square_avg, square_avg_run), (acc_delta, acc_delta_run))
    for home, result in updated:
        if result is not home:
            home.copy_(result)
