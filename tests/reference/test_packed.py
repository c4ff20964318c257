"""Packed masks: the bit order, the round trip, and packed_linear against masked_linear."""

import pytest
import torch
from compressft_kernels.reference import masked_linear, pack_mask, packed_linear, unpack_mask


@pytest.mark.parametrize("columns", [0, 1, 7, 8, 9, 17, 63, 65, 130])
@pytest.mark.parametrize("leading", [(1,), (0,), (17,), (2, 3), ()])
def test_round_trip(random, leading, columns):
    mask = random(*leading, columns) > 0
    bits = pack_mask(mask)
    assert bits.dtype == torch.uint8 and bits.shape == (*leading, (columns + 7) // 8)
    assert torch.equal(unpack_mask(bits, columns), mask)


def test_bit_order():
    """Column c is bit c % 8, least significant first, of byte c // 8: as Python's little-endian integers."""
    mask = torch.zeros(3, 19, dtype=torch.bool)
    for row, columns in enumerate(([0, 9], [7, 8, 18], range(19))):
        mask[row, list(columns)] = True
        number = sum(1 << c for c in columns)
        assert bytes(pack_mask(mask)[row].tolist()) == number.to_bytes(3, "little")


def test_non_contiguous_and_broadcast_masks(random):
    mask = random(17, 9).t() > 0
    assert torch.equal(pack_mask(mask), pack_mask(mask.contiguous()))
    row = (random(1, 17) > 0).expand(5, 17)
    assert torch.equal(unpack_mask(pack_mask(row).t().contiguous().t(), 17), row)


def test_spare_bits_are_ignored(random):
    mask = random(3, 13) > 0
    bits = pack_mask(mask)
    assert not (bits[:, 1] >> 5).any()
    assert torch.equal(unpack_mask(bits | torch.tensor([0, 0b11100000], dtype=torch.uint8), 13), mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(17, 63), (2, 3, 65), (0, 130), (1,)])
@pytest.mark.parametrize("threshold", [0.0, float("inf"), float("-inf")])
def test_same_as_masked_linear(random, gradients, shape, dtype, threshold):
    x, weight, scores, bias = (random(*s, dtype=dtype) for s in (shape, (65, shape[-1]), (65, shape[-1]), (65,)))
    bits = pack_mask(scores > threshold)
    got, dy, grads = gradients(lambda x, w, b: packed_linear(x, w, bits, bias=b), x, weight, bias)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    want = masked_linear(x, weight, scores, threshold=threshold, bias=bias)
    assert torch.equal(got, want)
    for a, b in zip(grads, torch.autograd.grad(want, leaves, dy), strict=True):
        assert torch.equal(a, b)


def test_gradcheck(random):
    """On copies of the weight: gradcheck moves its operands through `.data`, which a kept weight cannot see."""
    bits = pack_mask(random(3, 10) > 0)
    leaves = [t.requires_grad_() for t in (random(2, 10), random(3, 10), random(3))]
    assert torch.autograd.gradcheck(lambda x, w, b: packed_linear(x, w.clone(), bits, bias=b), leaves)


@pytest.mark.parametrize("trained", [False, True])
def test_saves_x_only_for_a_trained_weight(random, trained):
    x, weight, bits = random(6, 7).requires_grad_(), random(5, 7).requires_grad_(trained), pack_mask(random(5, 7) > 0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        packed_linear(x, weight, bits)
    assert sorted(saved) == sorted(t.data_ptr() for t in ((x, weight, bits) if trained else (weight, bits)))


def test_weight_and_bits_are_not_changed(random):
    weight, bits = random(5, 7), pack_mask(random(5, 7) > 0)
    before = weight.clone(), bits.clone()
    packed_linear(random(2, 7).requires_grad_(), weight, bits).sum().backward()
    assert torch.equal(weight, before[0]) and torch.equal(bits, before[1])


def test_under_autocast(random):
    x, weight, scores = random(6, 7).float().requires_grad_(), random(5, 7).float(), random(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_linear(x, weight, pack_mask(scores > 0))
        assert torch.equal(y, masked_linear(x, weight, scores)) and y.dtype == torch.bfloat16
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.float32
    torch.testing.assert_close(dx, (weight * (scores > 0)).sum(0).expand(6, 7), rtol=2e-2, atol=2e-2)


def test_errors_name_the_shapes(random):
    weight, bits = random(3, 10), pack_mask(random(3, 10) > 0)
    with pytest.raises(ValueError, match=r"pack_mask: mask \(3, 10\) is torch.float64; want \(..., columns\) bool"):
        pack_mask(weight)
    with pytest.raises(ValueError, match=r"unpack_mask: bits \(3, 2\) are torch.uint8; want \(..., 3\) uint8 for 17"):
        unpack_mask(bits, 17)
    with pytest.raises(ValueError, match=r"unpack_mask: bits \(3, 2\) are torch.int64"):
        unpack_mask(bits.long(), 10)
    with pytest.raises(ValueError, match=r"packed_linear: x \(2, 10\), weight \(3, 10\), bits \(3, 1\) do not fit"):
        packed_linear(random(2, 10), weight, bits[:, :1])
    with pytest.raises(ValueError, match=r"bits are torch.bool\); want x"):
        packed_linear(random(2, 10), weight, bits > 0)
    with pytest.raises(ValueError, match=r"packed_linear: x torch.float16, weight torch.float64; want one"):
        packed_linear(random(2, 10).half(), weight, bits)
