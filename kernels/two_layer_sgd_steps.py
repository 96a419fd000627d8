"""Training steps of the two-layer network in Triton: the launches of one step, again and again.

    losses[s], w1, w2 = step(x[s], y[s], w1, w2)        see two_layer_sgd_step.py

Triton has no meeting of a whole grid, so that a step cannot be one launch, nor all of them.
"""

import torch

from ._registration import raw_op
from .two_layer_sgd_step import sgd_step


@raw_op("(Tensor x, Tensor y, Tensor(a!) w1, Tensor(b!) w2, float lr, int steps) -> Tensor")
def two_layer_sgd_steps(x, y, w1, w2, lr, steps):
    batches = [(x, y)] * steps if x.dim() == 2 else list(zip(x, y, strict=True))
    torch._check(len(batches) == steps, lambda: "steps: expected one for each batch")
    losses = [sgd_step(*batch, w1, w2, lr) for batch in batches]
    return torch.stack(losses) if losses else x.new_empty(0)
