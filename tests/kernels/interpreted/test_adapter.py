"""The bottleneck adapter's kernels against the plain-torch twin in float64."""

import pytest
import torch
from compressft_kernels import adapter_backward_triton, adapter_triton
from compressft_kernels.adapter_backward_triton import Wanted
from compressft_kernels.numerics_triton import power_of_two
from compressft_kernels.reference.bottleneck import ACTIVATIONS, adapter

SMALL = {"BLOCK_T": 16, "BLOCK_K": 32, "BLOCK_O": 32, "num_warps": 4, "num_stages": 2}
SMALL_WEIGHTS = {"BLOCK_T": 16, "BLOCK_D": 32, "SPLIT": 3, "num_warps": 4, "num_stages": 2}
SHIPPED = {"BLOCK_T": 64, "BLOCK_K": 64, "BLOCK_O": 128, "num_warps": 4, "num_stages": 3}
SHIPPED_WEIGHTS = {"BLOCK_T": 64, "BLOCK_D": 128, "SPLIT": 2, "num_warps": 8, "num_stages": 3}
EPS = 1e-5
NAMES = ("x", "down", "down_bias", "up", "up_bias", "gamma", "beta")
SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.float16


@pytest.fixture
def operands(random, poison):
    """operands(length, width, size, ...) -> the tensors of one adapter by name, and its residual and dy."""

    def make(length, width, size, dtype=DOUBLE, out=None, norm=False, bias=True, weights=None, offset=0.0):
        out, weights = out or width, weights or dtype

        def draw(*shape, spread=1.0, centre=0.0, dtype=dtype):
            return poison((random(*shape) * spread + centre).to(dtype))

        return {
            "x": draw(length, width, centre=offset),
            "down": draw(size, width, spread=width**-0.5, dtype=weights),
            "down_bias": draw(size, dtype=weights) if bias else None,
            "up": draw(out, size, spread=size**-0.5, dtype=weights),
            "up_bias": draw(out, dtype=weights) if bias else None,
            "gamma": draw(width, spread=0.3, centre=1.0, dtype=weights) if norm else None,
            "beta": draw(width, spread=0.3, dtype=weights) if norm else None,
            "residual": draw(length, out),
            "dy": draw(length, out),
        }

    return make


def kernels(o, activation="gelu", scale=1.0, residual="none", wanted=None, chunk=32, shipped=False):
    """(y, gradients by name) of the kernels; residual is "none", "given" or "x"."""
    rows, weights = (SHIPPED, SHIPPED_WEIGHTS) if shipped else (SMALL, SMALL_WEIGHTS)
    rows, weights = ({**config, "BLOCK_R": power_of_two(o["up"].shape[1])} for config in (rows, weights))
    given = o["residual"] if residual == "given" else None
    x, down, down_bias, up, up_bias, gamma, beta = (o[name] for name in NAMES)
    y, z, mean, rstd = adapter_triton.forward(
        x, down, down_bias, up, up_bias, activation, scale, given, residual == "x", gamma, beta, EPS, True, rows
    )
    assert z.shape == (x.shape[0], up.shape[1]) and z.dtype == x.dtype
    assert mean.shape == rstd.shape == ((x.shape[0],) if gamma is not None else (0,))
    gradients = adapter_backward_triton.backward(
        o["dy"], x, z, mean, rstd, down, down_bias, up, up_bias, gamma, beta, activation, scale, residual == "x",
        wanted or Wanted(), {**rows, "CHUNK": chunk}, weights,
    )  # fmt: skip
    return y, dict(zip(NAMES, gradients, strict=True))


def twin(o, activation="gelu", scale=1.0, residual="none", dtype=DOUBLE):
    """The same by autograd in float64."""
    leaves = {name: o[name].to(dtype, copy=True).requires_grad_() for name in NAMES if o[name] is not None}
    norm = (leaves["gamma"], leaves["beta"], EPS) if "gamma" in leaves else None
    added = {"none": None, "given": o["residual"].to(dtype), "x": leaves["x"]}[residual]
    y = adapter(
        leaves["x"], leaves["down"], leaves.get("down_bias"), leaves["up"], leaves.get("up_bias"),
        activation=activation, scale=scale, residual=added, norm=norm,
    )  # fmt: skip
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, leaves.values(), o["dy"].to(dtype)), strict=True))


def compare(close, o, got, want):
    close(got[0], want[0], o["x"].dtype)
    for name in NAMES:
        if name in want[1]:
            # A weight of a wider dtype than x has the errors of x's.
            narrow = min(o[name].dtype, o["x"].dtype, key=lambda dtype: dtype.itemsize)
            assert got[1][name].dtype == o[name].dtype
            close(got[1][name].to(narrow), want[1][name], narrow)
        else:
            assert got[1][name] is None


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("length", "width", "size"), [(65, 65, 17), (17, 130, 64), (1, 17, 1), (33, 64, 32), (2, 1, 1)]
)
def test_gradients(close, operands, length, width, size, norm, dtype):
    o = operands(length, width, size, dtype, norm=norm)
    options = {"scale": -0.7, "residual": "x"}
    compare(close, o, kernels(o, **options), twin(o, **options))


@pytest.mark.parametrize("dtype", [DOUBLE, HALF])
@pytest.mark.parametrize("norm", [False, True])
def test_shipped_blocks(close, operands, norm, dtype):
    o = operands(130, 257, 40, dtype, norm=norm)
    options = {"scale": 1.5, "residual": "x"}
    compare(close, o, kernels(o, chunk=64, shipped=True, **options), twin(o, **options))


def test_widest(close, operands):
    o = operands(20, 65, 130, SINGLE, norm=True)
    compare(close, o, kernels(o), twin(o))


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(close, operands, activation, dtype):
    o = operands(17, 24, 20, dtype)
    # Large, small and exactly zero pre-activations: without a bias a row of zeros gives zeros.
    o["down_bias"] = None
    o["x"][0] = 0
    o["x"][1:4] *= 20
    compare(close, o, kernels(o, activation), twin(o, activation))


@pytest.mark.parametrize("residual", ["none", "given", "x"])
@pytest.mark.parametrize(("norm", "bias"), [(False, False), (True, False), (True, True)])
def test_residuals_and_biases(close, operands, residual, norm, bias):
    o = operands(20, 33, 17, norm=norm, bias=bias)
    compare(close, o, kernels(o, residual=residual), twin(o, residual=residual))


@pytest.mark.parametrize(("width", "out"), [(17, 70), (70, 17)])
@pytest.mark.parametrize("norm", [False, True])
def test_other_output_width(close, operands, width, out, norm):
    o = operands(20, width, 5, out=out, norm=norm)
    compare(close, o, kernels(o, residual="given"), twin(o, residual="given"))


@pytest.mark.parametrize("norm", [False, True])
def test_wanted(operands, norm):
    """Every gradient alone, two left out, and none: the same bits as all together, None for the others."""
    o = operands(20, 33, 17, norm=norm)
    together = kernels(o, scale=-0.7)[1]
    fields = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "gamma", "beta")
    choices = [{field} for field in fields] + [set(fields) - {"x"}, set(fields) - {"up_weight"}, set()]
    for chosen in choices:
        got = kernels(o, scale=-0.7, wanted=Wanted(**{field: field in chosen for field in fields}))[1]
        for field, name in zip(fields, NAMES, strict=True):
            if field not in chosen or o[name] is None:
                assert got[name] is None
            elif field == "up_bias" and "up_weight" not in chosen:
                torch.testing.assert_close(got[name], together[name], atol=1e-12, rtol=0)
            else:
                assert torch.equal(got[name], together[name]), (chosen, name)


def test_rows_far_from_zero(operands):
    """Mean 1000, standard deviation 1, in float32: y to a few roundings, gradients no worse than PyTorch's own."""
    o = operands(17, 96, 17, SINGLE, norm=True, offset=1000.0)
    o["x"][4] = 7.0
    (y, got), (exact, want), (_, plain) = kernels(o), twin(o), twin(o, dtype=SINGLE)
    torch.testing.assert_close(y.double(), exact, atol=4e-6, rtol=0)
    for name in NAMES:
        allowed = (plain[name].double() - want[name]).abs().max() + 2e-6 * want[name].abs().max()
        assert (got[name].double() - want[name]).abs().max() <= allowed, name


def test_half_rows_far_from_zero(close, operands):
    o = operands(40, 96, 17, HALF, norm=True, offset=10.0)
    compare(close, o, kernels(o), twin(o))


@pytest.mark.parametrize("norm", [False, True])
def test_strided_rows(close, operands, random, poison, norm):
    o = operands(20, 33, 17, norm=norm)
    for name in ("x", "residual", "dy"):
        o[name] = poison(random(20, 50)[:, :33])
    o["down"], o["up"] = poison(random(17, 40)[:, :33]), poison(random(33, 19)[:, :17])
    compare(close, o, kernels(o, residual="given"), twin(o, residual="given"))


def test_columns_first(close, operands, random, poison):
    """Operands whose last dimension is not contiguous."""
    o = operands(20, 33, 17)
    o.update(x=poison(random(33, 20).T), dy=poison(random(33, 20).T), residual=poison(random(33, 20).T))
    o.update(down=poison(random(33, 17).T), up=poison(random(17, 33).T))
    compare(close, o, kernels(o, residual="given"), twin(o, residual="given"))


@pytest.mark.parametrize("stretched", ["rows", "all"])
def test_broadcast(close, operands, random, poison, stretched):
    o = operands(20, 33, 17)
    for name in ("residual", "dy"):
        one = random(1, 33) if stretched == "rows" else random(1, 1)
        o[name] = poison(one.expand(20, 33))
    compare(close, o, kernels(o, residual="given"), twin(o, residual="given"))


@pytest.mark.parametrize("norm", [False, True])
def test_wider_weights(close, operands, norm):
    """Half precision x with float32 weights."""
    o = operands(20, 33, 17, HALF, norm=norm, weights=SINGLE)
    compare(close, o, kernels(o), twin(o))


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("residual", ["given", "x"])
def test_zero_up_projection_is_the_residual(operands, residual, dtype):
    o = operands(17, 33, 17, dtype)
    o["up"].zero_()
    o["up_bias"].zero_()
    assert torch.equal(kernels(o, residual=residual, scale=-0.7)[0], o["residual" if residual == "given" else "x"])


@pytest.mark.parametrize("norm", [False, True])
def test_empty_batch(operands, norm):
    o = operands(0, 33, 17, norm=norm)
    y, gradients = kernels(o)
    assert y.shape == (0, 33)
    for name in NAMES:
        if o[name] is not None:
            assert gradients[name].shape == o[name].shape and not gradients[name].any()


@pytest.mark.parametrize("norm", [False, True])
def test_nothing_saved(operands, norm):
    o = operands(17, 33, 17, norm=norm)
    config = {**SMALL, "BLOCK_R": 32}
    x, down, down_bias, up, up_bias, gamma, beta = (o[name] for name in NAMES)
    y, *saved = adapter_triton.forward(
        x, down, down_bias, up, up_bias, "gelu", 1.0, None, False, gamma, beta, EPS, False, config
    )
    assert torch.equal(y, kernels(o)[0]) and [t.shape for t in saved] == [(0,)] * 3


def test_chunks_are_one_sum(operands):
    """Gradients do not depend on how many rows are taken at a time."""
    o = operands(100, 33, 17, norm=True)
    apart, whole = (kernels(o, chunk=chunk)[1] for chunk in (16, 128))
    for name in NAMES:
        torch.testing.assert_close(apart[name], whole[name], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "chunk", "split"),
    [
        ((32768, 4096, 4096), 4224, 4),
        ((32768, 384, 384), 42240, 32),
        ((16, 768, 768), 21120, 1),
        ((0, 1, 1), 16773504, 1),
    ],
)
def test_shares(size, chunk, split):
    rows, weights = adapter_backward_triton.shares(size, 2, {"BLOCK_T": 32}, {"BLOCK_T": 64, "BLOCK_D": 128}, 132)
    assert (rows["CHUNK"], weights["SPLIT"]) == (chunk, split)
