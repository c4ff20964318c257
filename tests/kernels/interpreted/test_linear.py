"""Masked, packed and NF4 products and their gradients, against the twin in float64."""

import pytest
import torch
from compressft_kernels import linear_triton as kernels
from compressft_kernels import reference
from compressft_kernels.nf4 import NF4, dequantise
from compressft_kernels.reference.gated import effective

DTYPES = [torch.float64, torch.float32, torch.float16]
SMALL = {"BLOCK_T": 16, "BLOCK_O": 64, "BLOCK_R": 64, "GROUP": 2, "num_warps": 4, "num_stages": 2}
SMALL_GRADIENT = {"BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP": 2, "num_warps": 4, "num_stages": 2}

# T, N, K: one tile, tails in every direction, more tiles than programs, one row
SHAPES = [(1, 1, 1), (17, 65, 63), (65, 17, 130), (130, 130, 65), (1, 130, 17)]
# Every shape is exact in float64; the others round, wherever tiles end.
SHAPES_AND_DTYPES = [(s, d) for d in DTYPES for s in SHAPES if d == torch.float64 or s in SHAPES[1:3]]


def masks(random, size, dtype):
    scores = random(*size, dtype=dtype)
    return {
        "none": None,
        "scores": scores,
        "all": scores.abs() + 1,
        "nothing": -scores.abs() - 1,
        "bits": reference.pack_mask(random(*size) > 0),
    }


def masked(weight, gate, threshold):
    return effective(weight.double(), [], gate, threshold, tuple(weight.shape), torch.float64)


@pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mask", ["none", "scores", "all", "nothing", "bits"])
def test_product(random, poison, close, dtype, shape, turned, mask):
    rows, outputs, inputs = shape
    weight = random(outputs, inputs, dtype=dtype)
    gate = masks(random, (outputs, inputs), dtype)[mask]
    x = random(rows, outputs if turned else inputs, dtype=dtype)
    bias = None if turned else random(outputs, dtype=dtype)
    arguments = (poison(x), poison(weight), [], poison(gate), 0.25, poison(bias), (outputs, inputs), SMALL, 4)
    want = x.double() @ masked(weight, gate, 0.25).t() if not turned else x.double() @ masked(weight, gate, 0.25)
    close(kernels.product(*arguments, turned=turned), want if bias is None else want + bias.double(), dtype)


@pytest.mark.parametrize("columns", [1, 63, 71])
def test_spare_bits_of_a_rows_last_byte_are_ignored(random, poison, close, columns):
    """Whole bytes are loaded, where columns end within one too."""
    kept = random(37, columns) > 0
    bits = reference.pack_mask(kept)
    bits[:, -1] |= 0xFF << columns % 8 & 0xFF
    weight, x, dy = random(37, columns), random(5, columns), random(5, 37)
    size, run = (37, columns), [poison(weight), [], poison(bits), 0.0, None, (37, columns), SMALL, 4]
    close(kernels.product(poison(x), *run), x @ (weight * kept).t(), torch.float64)
    close(kernels.product(poison(dy), *run, turned=True), dy @ (weight * kept), torch.float64)
    out = kernels.materialise(poison(weight), [], poison(bits), 0.0, size, torch.float64)
    assert torch.equal(out, weight * kept)
    _, dweight = kernels.gradients(
        poison(x), poison(dy), poison(weight), [], poison(bits), 0.0, SMALL_GRADIENT, 1, False, True
    )
    close(dweight, dy.t() @ x * kept, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 64])
def test_sums_cut_in_parts(random, poison, close, dtype, programs):
    """Few tiles and many programs: the inner dimension is cut, with a tail that leaves the last part empty."""
    x, weight, bias = random(3, 64 * 9 + 5, dtype=dtype), random(70, 64 * 9 + 5, dtype=dtype), random(70, dtype=dtype)
    y = kernels.product(poison(x), poison(weight), [], None, 0.0, poison(bias), (70, 64 * 9 + 5), SMALL, programs)
    close(y, x.double() @ weight.double().t() + bias.double(), dtype)


@pytest.mark.parametrize("threshold", [float("-inf"), -0.25, 0.0, 0.5])
def test_the_threshold_is_strict(poison, threshold):
    scores = torch.tensor([[-0.5, -0.25, 0.0, 0.25, 0.5, float("nan"), float("-inf")]])
    weight = torch.arange(1.0, 8.0).view(1, 7)
    x = torch.eye(7)
    y = kernels.product(poison(x), poison(weight), [], poison(scores), threshold, None, (1, 7), SMALL, 4)
    assert torch.equal(y, (weight * (scores > threshold)).t())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_broadcast_operands(random, poison, close, dtype):
    """Rows of a wider buffer, a weight stored transposed, one row of scores for all outputs."""
    x = random(9, 80, dtype=dtype)[:, 3:53]
    weight, scores = random(50, 33, dtype=dtype).t(), random(1, 50, dtype=dtype).expand(33, 50)
    kept = masked(weight, scores, 0.0)
    for turned in (False, True):
        given = random(9, 33, dtype=dtype) if turned else x
        for tensor in (given, given[:1].expand(9, -1), given.t().contiguous().t()):
            y = kernels.product(
                poison(tensor), poison(weight), [], poison(scores), 0.0, None, (33, 50), SMALL, 4, turned=turned
            )
            close(y, tensor.double() @ (kept if turned else kept.t()), dtype)


@pytest.mark.parametrize(("shape", "dtype"), [*SHAPES_AND_DTYPES, ((0, 17, 33), torch.float64)])
@pytest.mark.parametrize("mask", ["scores", "nothing", "bits"])
@pytest.mark.parametrize("programs", [1, 64])
def test_gradients(random, poison, close, dtype, shape, mask, programs):
    rows, outputs, inputs = shape
    x, dy = random(rows, inputs, dtype=dtype), random(rows, outputs, dtype=dtype)
    weight = random(outputs, inputs, dtype=dtype)
    gate = masks(random, (outputs, inputs), dtype)[mask]
    scored = mask != "bits"
    dscores, dweight = kernels.gradients(
        poison(x), poison(dy), poison(weight), [], poison(gate), 0.25, SMALL_GRADIENT, programs, scored, True
    )
    d = dy.double().t() @ x.double()
    kept = reference.unpack_mask(gate, inputs) if mask == "bits" else gate > 0.25
    close(dweight, d * kept, dtype)
    if scored:
        close(dscores, d * weight.double(), dtype)
    else:
        assert dscores is None


def test_only_the_wanted_gradients(random, poison):
    x, dy, weight, scores = random(5, 7), random(5, 6), random(6, 7), random(6, 7)
    both = [poison(t) for t in (x, dy, weight)]
    run = [*both, [], poison(scores), 0.0, SMALL_GRADIENT]
    for programs in (1, 64):
        assert kernels.gradients(*run, programs, False, True)[0] is None
        assert kernels.gradients(*run, programs, True, False)[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mask", ["none", "bits", "scores"])
def test_nf4(random, poison, close, dtype, double, turned, mask):
    size = (37, 192)
    stored = NF4.quantise(random(*size, dtype=torch.float32))
    tables = stored.tables()
    if double:
        scales = torch.randint(0, 256, stored.absmax.shape, dtype=torch.uint8)
        more = (
            random(1, dtype=torch.float32).abs(),
            random(256, dtype=torch.float32),
            random(1, dtype=torch.float32)[0],
        )
        tables = NF4(stored.packed, scales, stored.code, size, more).tables()
    weight = dequantise(stored.packed, tables, size, torch.float64)
    gate = masks(random, size, dtype)[mask]
    x = random(5, size[0] if turned else size[1], dtype=dtype)
    arguments = (
        poison(x),
        poison(stored.packed),
        [poison(t) for t in tables],
        poison(gate),
        0.25,
        None,
        size,
        SMALL,
        4,
    )
    # The weight is rounded to the dtype before it is multiplied, in the twin as in the kernel.
    kept = masked(weight.to(dtype) if dtype == torch.float16 else weight, gate, 0.25)
    close(kernels.product(*arguments, turned=turned), x.double() @ (kept if turned else kept.t()), dtype)
    out = kernels.materialise(poison(stored.packed), [poison(t) for t in tables], poison(gate), 0.25, size, dtype)
    close(out, masked(weight, gate, 0.25), dtype)
    if mask == "scores":
        dy, x = random(5, size[0], dtype=dtype), random(5, size[1], dtype=dtype)
        for programs in (1, 64):
            dscores, _ = kernels.gradients(
                poison(x), poison(dy), poison(stored.packed), [poison(t) for t in tables], poison(gate), 0.25,
                SMALL_GRADIENT, programs, True, False,
            )  # fmt: skip
            close(dscores, (dy.double().t() @ x.double()) * weight, dtype)


@pytest.mark.parametrize("turned", [False, True])
def test_no_rows(random, turned):
    x = random(0, 5 if turned else 7)
    y = kernels.product(x, random(5, 7), [], random(5, 7), 0.0, None, (5, 7), SMALL, 4, turned=turned)
    assert y.shape == (0, 7 if turned else 5)
