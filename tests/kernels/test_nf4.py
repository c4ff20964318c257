"""NF4 weights: against bitsandbytes on the same numbers, and the messages for what does not fit."""

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn import Params4bit
from compressft_kernels import NF4, masked_linear, pack_mask, packed_linear, unpack_mask
from compressft_kernels.nf4 import NF4_CODE, dequantise


@pytest.fixture(params=[False, True], ids=["plain", "double"])
def parameter(random, request):
    # Not 96 columns: bitsandbytes 0.50.2 dequantises rows that are no multiple of 64 wrongly on CPU.
    weight = random(24, 128, dtype=torch.float32)
    return Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=request.param).to("cpu")


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float64: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_reads_what_bitsandbytes_wrote(parameter):
    weight = NF4.of(parameter)
    want = bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state)
    got = dequantise(weight.packed, weight.tables(), weight.shape, torch.float32)
    assert weight.shape == (24, 128) and len(weight.tables()) == (5 if parameter.quant_state.nested else 2)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def test_quantises_as_bitsandbytes_does(random):
    weight = random(24, 96, dtype=torch.float32)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    got = NF4.quantise(weight)
    assert torch.equal(got.packed, packed.flatten())
    assert torch.equal(got.absmax, state.absmax)
    assert torch.equal(got.code, state.code) and torch.equal(torch.tensor(NF4_CODE), state.code)


def test_a_last_block_that_is_not_full(random):
    weight = random(3, 30, dtype=torch.float32)
    got = NF4.quantise(weight)
    back = dequantise(got.packed, got.tables(), got.shape, torch.float64)
    # Half the widest gap between two codes, times the block's largest weight.
    assert (back - weight).abs().max() <= 0.152 * weight.abs().max()
    assert torch.equal(NF4.quantise(back.float()).packed, got.packed)


def test_zeros_stay_zeros():
    got = NF4.quantise(torch.zeros(4, 32))
    assert not dequantise(got.packed, got.tables(), got.shape, torch.float32).any()


def test_layers_over_it_equal_those_over_the_dequantised_weight(random, parameter):
    weight = NF4.of(parameter)
    dense = dequantise(weight.packed, weight.tables(), weight.shape, torch.float64)
    x, scores, bias = random(5, 128).requires_grad_(), random(24, 128).requires_grad_(), random(24).requires_grad_()
    dy = random(5, 24)
    got, want = (
        (y, *torch.autograd.grad(y, (x, scores, bias), dy))
        for y in (masked_linear(x, w, scores, threshold=0.2, bias=bias) for w in (weight, dense))
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    bits = pack_mask(random(24, 128) > 0)
    assert torch.equal(packed_linear(x, weight, bits), packed_linear(x, dense, bits))
    assert torch.equal(packed_linear(x, weight, None), x @ dense.t())
    assert torch.equal(packed_linear(x, weight, bits), x @ (dense * unpack_mask(bits, 128)).t())


def test_saves_the_packed_weight_and_no_dense_one(random):
    weight = NF4.quantise(random(64, 128, dtype=torch.float32))
    x, scores = random(3, 128).requires_grad_(), random(64, 128).requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        masked_linear(x, weight, scores)
    dense = [t for t in seen if t.numel() == 64 * 128]
    assert len(dense) == 1 and dense[0].data_ptr() == scores.data_ptr()


def test_errors_name_what_does_not_fit(random):
    good = NF4.quantise(random(4, 32, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"want 80 bytes of uint8, 3 scales"):
        NF4(good.packed, good.absmax, good.code, (5, 32))
    with pytest.raises(ValueError, match=r"absmax \(2,\) torch.float32 .*2 scales \(uint8 with nested ones"):
        NF4(good.packed, good.absmax, good.code, (4, 32), (good.absmax, good.code, good.code[0]))
    with pytest.raises(ValueError, match="no quant_state"):
        NF4.of(torch.nn.Parameter(torch.zeros(2, 2)))
    wide = Params4bit(torch.zeros(4, 128), requires_grad=False, blocksize=128, quant_type="nf4").to("cpu")
    with pytest.raises(ValueError, match="blocks of 128 weights; the kernels read blocks of 64"):
        NF4.of(wide)
    with pytest.raises(ValueError, match=r"masked_linear: x \(3, 31\), weight \(4, 32\), scores \(4, 32\) do not fit"):
        masked_linear(random(3, 31), good, random(4, 32))
