"""Autocast and gradient scaling: the rule that each op's docstring states, and GradScaler.

relu, dropout           the input's dtype: autocast changes nothing
relu_max_pool2d         likewise
mse_loss                half precisions are taken in float32
two_layer, its loss     all but float64 in autocast's dtype
two_layer_sgd_step      autocast changes nothing
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import configurations, dtype_id

import pyext.functional as P
from pyext import nn as lab
from pyext.registry import FLOATING_DTYPES

WITH_EAGER = configurations(include_eager=True)
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_elementwise_ops_and_pooling_return_the_dtypes_of_their_namesakes(dtype, backend, device):
    with torch.autocast(device, dtype):
        for a in FLOATING_DTYPES:
            x = torch.ones(3, dtype=a, device=device)
            assert P.relu(x, backend=backend).dtype == F.relu(x).dtype == a
            assert P.dropout(x, backend=backend).dtype == F.dropout(x).dtype == a
            plane = x.expand(1, 3, 3)
            pooled = P.relu_max_pool2d(plane, 2, backend=backend)
            assert pooled.dtype == F.max_pool2d(plane, 2).dtype == a
            for b in (*FLOATING_DTYPES, torch.int64):
                y = torch.zeros(3, dtype=b, device=device)
                for left, right in ((x, y), (y, x)):
                    ours = P.mse_loss(left, right, backend=backend)
                    assert ours.dtype == F.mse_loss(left, right).dtype
                    assert ours.dtype == torch.promote_types(
                        torch.float32, torch.promote_types(a, b)
                    )


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_two_layer_casts_all_but_float64_as_linear_does(dtype, backend, device):
    for own in FLOATING_DTYPES:
        x, y, w1, w2 = (
            torch.randn(s, device=device).to(own) for s in ((5, 4), (5, 2), (4, 3), (3, 2))
        )
        with torch.autocast(device, dtype):
            expected = F.linear(x, w1.t()).dtype
            assert expected == (own if own == torch.float64 else dtype)
            assert P.two_layer(x, w1, w2, backend=backend).dtype == expected
            loss = P.two_layer_mse_loss(x, y, w1, w2, backend=backend)
            assert loss.dtype == torch.promote_types(expected, torch.float32)
            before = w1.clone()
            assert P.two_layer_sgd_step(x, y, w1, w2, 0.5, backend=backend).dtype == own
            assert not torch.equal(w1, before)


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_gradients_have_the_leaves_dtype_and_are_those_of_explicit_casts(dtype, backend, device):
    leaves = [torch.randn(s, device=device) for s in ((5, 4), (5, 2), (4, 3), (3, 2))]

    def gradients(call):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        call(*given).backward()
        return [each.grad for each in given]

    with torch.autocast(device, dtype):
        actual = gradients(lambda *given: P.two_layer_mse_loss(*given, backend=backend))

    def by_hand(x, y, w1, w2):
        out = P.two_layer(x.to(dtype), w1.to(dtype), w2.to(dtype), backend=backend)
        return P.mse_loss(out.float(), y, "sum", backend=backend)

    expected = gradients(by_hand)
    assert all(grad.dtype == torch.float32 for grad in actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_a_loss_beyond_float16_is_finite_under_autocast(backend, device):
    x, w1, w2 = (torch.full(s, 8.0, device=device) for s in ((2, 8), (8, 8), (8, 8)))
    with torch.autocast(device, torch.float16):
        loss = P.two_layer_mse_loss(x, torch.zeros(2, 8, device=device), w1, w2, backend=backend)
    assert loss == 16 * 2.0**30  # each output is 2^15, which float16 holds


def test_autocast_for_another_device_changes_nothing():
    x, w1, w2 = (torch.randn(s) for s in ((5, 4), (4, 3), (3, 2)))
    expected = P.two_layer(x, w1, w2)
    torch.set_autocast_enabled("cuda", True)
    try:
        actual = P.two_layer(x, w1, w2)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def _model(device):
    torch.manual_seed(0)
    layers = (torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    return torch.nn.Sequential(*layers, torch.nn.ReLU()).to(device)


def _scaled_step(model, optimizer, scaler, x, y, loss):
    optimizer.zero_grad()
    with torch.autocast(x.device.type, torch.float16):
        value = loss(model(x), y)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    return value.item()


@pytest.mark.parametrize(("backend", "device"), WITH_EAGER)
def test_grad_scaler_trains_and_skips_infinite_gradients(backend, device):
    plain = _model(device)
    swapped = copy.deepcopy(plain)
    lab.swap(swapped, backend)
    x, y = torch.randn(8, 6, device=device), torch.rand(8, 3, device=device)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, swapped)]
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0) for _ in range(2)]
    losses = torch.nn.MSELoss(), lab.MSELoss(backend=backend)

    def step(x):
        runs = zip((plain, swapped), optimizers, scalers, losses, strict=True)
        return [_scaled_step(model, opt, scaler, x, y, loss) for model, opt, scaler, loss in runs]

    history = [step(x) for _ in range(5)]
    assert history[-1][1] < history[0][1]
    for reference, value in history:
        assert value == pytest.approx(reference, rel=5e-3)  # float16 rounds to 1e-3
    before = copy.deepcopy(swapped.state_dict())
    step(torch.full_like(x, torch.inf))
    assert [scaler.get_scale() for scaler in scalers] == [512.0, 512.0]
    torch.testing.assert_close(swapped.state_dict(), before, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(x)[1] < history[0][1]
    assert not torch.equal(swapped[0].weight, before["0.weight"])
