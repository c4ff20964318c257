"""Four-bit blocks: onnxruntime's own quantiser to the bit, rounding bounds, packing, live columns, gradients."""

import numpy as np
import pytest
import torch
from onnxruntime.capi._pybind_state import quantize_matmul_4bits

from compressft.modules.gate import ColumnGate, MaskGate
from compressft.modules.int4 import (
    Grid,
    blocks,
    dequantise,
    fake_quantise,
    grid_of,
    on_live_columns,
    pack,
    quantise,
    round_inputs,
    stored_bytes,
    unpack,
)
from compressft.modules.linear import CompressedLinear, dense
from compressft.modules.quantizer import Int4Quantizer


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def example(columns, seed=0):
    weight = draw(48, columns, seed=seed) * (0.01 + draw(48, 1, seed=seed + 1).abs())
    weight[1], weight[2], weight[3] = 0.0, weight[2].abs(), -weight[3].abs()
    # Equal magnitudes of both signs, and exact halves between two steps.
    weight[4, :2] = torch.tensor([4.0, -4.0])
    weight[5] = torch.arange(columns) % 17 * 0.25 - 2.0
    return weight


@pytest.mark.parametrize("columns", [7, 32, 100, 256])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_scales_and_zero_points_are_onnxruntimes(columns, block, symmetric):
    weight = example(columns)
    count = -(-columns // block)
    padded = torch.nn.functional.pad(weight, (0, -columns % block)).t().contiguous().numpy()
    packed = np.zeros((48, count, block // 2), np.uint8)
    zeros, scales = np.zeros((48, (count + 1) // 2), np.uint8), np.zeros((48, count), np.float32)
    quantize_matmul_4bits(packed, padded, scales, zeros, block, 48, columns, symmetric)
    grid = grid_of(weight, block, symmetric)
    assert np.array_equal(grid.scale.numpy(), scales)
    got = quantise(weight, block, grid)
    want = unpack(torch.from_numpy(packed))
    # What stands behind the last column is not read.
    assert torch.equal(got.flatten(1)[:, :columns], want.flatten(1)[:, :columns].float())
    if symmetric:
        assert (grid.zero_point == 8).all()
    else:
        assert torch.equal(grid.zero_point, unpack(torch.from_numpy(zeros))[:, :count].float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 64])
def test_rounding_bounds(symmetric, block):
    weight = example(100)
    grid = grid_of(weight, block, symmetric)
    back = fake_quantise(weight, block, symmetric)
    step = grid.scale.abs().repeat_interleave(block, 1)[:, :100]
    error = (back - weight).abs()
    # The symmetric range ends at seven steps on the side opposite to the block's greatest value.
    room = torch.where(weight / grid.scale.repeat_interleave(block, 1)[:, :100] > 7.5, 1.0, 0.5) if symmetric else 0.5
    assert (error <= step * room * (1 + 1e-5) + 1e-12).all()
    assert (back[1] == 0).all() and back.isfinite().all()
    assert torch.equal(fake_quantise(back, block, symmetric), back) or not symmetric
    torch.testing.assert_close(fake_quantise(back, block, symmetric), back, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zero(symmetric):
    weight = example(96)
    mask = draw(48, 96, seed=3) > 0
    assert (fake_quantise(weight * mask, 32, symmetric)[~mask] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_smaller_blocks_err_less(symmetric):
    weight = draw(64, 256)
    errors = [(fake_quantise(weight, block, symmetric) - weight).norm() for block in (32, 64, 128, 256)]
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[-1]


def test_packing_round_trip():
    integers = torch.randint(0, 16, (5, 3, 32), generator=torch.Generator().manual_seed(0))
    packed = pack(integers)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3, 16)
    assert int(packed[0, 0, 0]) == int(integers[0, 0, 0]) + 16 * int(integers[0, 0, 1])
    assert torch.equal(unpack(packed), integers.to(torch.uint8))


def test_bytes():
    # 10 rows of 100: 4 blocks of 16 bytes, 4 scales of 4 bytes, and 2 bytes of zero points.
    assert stored_bytes(10, 100, 32, True) == 10 * (64 + 16)
    assert stored_bytes(10, 100, 32, False) == 10 * (64 + 16 + 2)
    assert stored_bytes(10, 100, 128, False) == 10 * (64 + 4 + 1)


def test_inputs_are_rounded_per_block():
    x = draw(3, 70) * torch.tensor([1.0, 100.0, 1.0]).repeat_interleave(32)[:70]
    x[0, :32] = 0.0
    got = round_inputs(x, 32)
    steps = blocks(x, 32).abs().amax(-1) / 127
    assert ((got - x).abs() <= steps.repeat_interleave(32, 1)[:, :70] * 0.5001).all()
    assert (got[0, :32] == 0).all() and not torch.equal(got, x)


def layer(columns=96, **settings):
    linear = CompressedLinear(columns, 48)
    with torch.no_grad():
        linear.weight.copy_(example(columns))
    linear.quantizer = Int4Quantizer(**settings)
    return linear


@torch.no_grad()
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", [0, 4])
def test_blocks_are_cut_as_after_the_columns_are_gone(symmetric, level):
    gated = layer(symmetric=symmetric, accuracy_level=level)
    gated.gates["structured"] = ColumnGate(24, 4)
    gated.gates["structured"].keep(torch.tensor([0, 2, 3, 7, 11, 12, 19, 20, 23]))
    live = gated.gates["structured"].columns().bool()
    small = layer(int(live.sum()), symmetric=symmetric, accuracy_level=level)
    small.weight.copy_(gated.weight[:, live])
    small.bias.copy_(gated.bias)
    x = draw(5, 96, seed=9)
    torch.testing.assert_close(gated(x), small(x[:, live]), rtol=1e-5, atol=1e-4)
    # Blocks cut through the dropped columns would be others.
    whole = on_live_columns(gated.weight * live, None, lambda w: fake_quantise(w, 32, symmetric))
    assert not torch.allclose(whole[:, live], fake_quantise(gated.weight[:, live], 32, symmetric), atol=1e-3)


def test_dropped_columns_get_a_gradient():
    linear, x = layer(), draw(5, 96, seed=9)
    gate = ColumnGate(24, 4)
    linear.gates["structured"] = gate
    gate.keep(torch.arange(12))
    gate.measure(True)
    dy = draw(5, 48, seed=10)
    (linear(x) * dy).sum().backward()
    want = ((dy.t() @ x) * linear.weight.detach()).sum(0).view(24, 4).sum(1)
    torch.testing.assert_close(gate.mask.grad, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("level", [0, 4])
def test_gradients_are_straight_through(level):
    linear, x = layer(accuracy_level=level), draw(5, 96, seed=9).requires_grad_()
    dy = draw(5, 48, seed=10)
    (linear(x) * dy).sum().backward()
    seen = round_inputs(x, 32) if level else x.detach()
    torch.testing.assert_close(linear.weight.grad, dy.t() @ seen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, dy @ fake_quantise(linear.weight, 32, True), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_masked_weights_stay_zero_and_dense_switches_off():
    linear, x = layer(), draw(5, 96, seed=9)
    gate = MaskGate(48, 96)
    mask = draw(48, 96, seed=3) > 0
    gate.keep(mask)
    linear.gates["magnitude"] = gate
    seen = linear.quantizer.rounded(linear.effective_weight())
    assert (seen[~mask] == 0).all() and (seen[mask] != 0).any()
    with dense():
        assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))
    linear.quantizer.active = False
    want = torch.nn.functional.linear(x, linear.weight * mask, linear.bias)
    torch.testing.assert_close(linear(x), want)


@torch.no_grad()
def test_a_fixed_grid_does_not_follow_the_weight():
    linear = layer()
    grid = grid_of(linear.weight, 32, True)
    linear.quantizer.fix(grid)
    linear.weight.mul_(0.37)
    want = dequantise(quantise(linear.weight, 32, grid), grid, 96)
    assert torch.equal(linear.quantizer.rounded(linear.weight), want)
    assert not torch.equal(fake_quantise(linear.weight, 32, True), want)
    assert linear.quantizer.state_dict().keys() == {"scale", "zero_point"}


@torch.no_grad()
def test_noise_rounds_a_random_share_in_training_only():
    linear = layer()
    linear.bias.zero_()
    whole = linear.eval()(torch.eye(96)).t()
    linear.quantizer.rate = 0.3
    assert torch.equal(linear(torch.eye(96)).t(), whole)
    first, second = (linear.train()(torch.eye(96)).t() for _ in range(2))
    differs = whole != linear.weight
    rounded = (first == whole)[differs].float().mean()
    assert 0.25 < rounded < 0.35
    assert ((first == whole) | (first == linear.weight)).all() and not torch.equal(first, second)


def test_grid_is_a_pair():
    scale, zero_point = grid_of(draw(4, 40), 32, False)
    assert isinstance(grid_of(draw(4, 40), 32, False), Grid) and scale.shape == zero_point.shape == (4, 2)
