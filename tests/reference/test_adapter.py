"""The adapter kernel's torch twin: against its formula written out in float64, gradients, and its error messages."""

import math

import pytest
import torch
from compressft_kernels.reference import ACTIVATIONS, adapter
from compressft_kernels.reference.bottleneck import adapter_gradients

FORMULAS = {
    "gelu": lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: max(v, 0.0),
    "silu": lambda v: v / (1 + math.exp(-v)),
    "tanh": math.tanh,
}


def tensors(width=7, size=3, rows=(2, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (*rows, width), "wd": (size, width), "bd": (size,), "wu": (width, size), "bu": (width,)}
    shapes |= {"residual": (*rows, width), "gamma": (width,), "beta": (width,)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in shapes.items()}


def naive(t, activation, scale, residual, norm):
    """Row by row, sum by sum, in Python floats."""
    rows = []
    width, size = t["wu"].shape
    lists = {name: value.double().reshape(-1, value.shape[-1]).tolist() for name, value in t.items()}
    for i, x in enumerate(lists["x"]):
        if norm:
            mean = sum(x) / width
            variance = sum((v - mean) ** 2 for v in x) / width
            gamma, beta = lists["gamma"][0], lists["beta"][0]
            x = [(v - mean) / math.sqrt(variance + 1e-5) * g + b for v, g, b in zip(x, gamma, beta, strict=True)]
        hidden = [
            FORMULAS[activation](sum(x[k] * lists["wd"][r][k] for k in range(width)) + lists["bd"][0][r])
            for r in range(size)
        ]
        y = [
            scale * (sum(hidden[r] * lists["wu"][c][r] for r in range(size)) + lists["bu"][0][c]) for c in range(width)
        ]
        rows.append([a + b for a, b in zip(y, lists["residual"][i], strict=True)] if residual else y)
    return torch.tensor(rows, dtype=torch.float64).view(t["x"].shape)


def call(t, activation="gelu", scale=1.0, residual=False, norm=False):
    return adapter(
        t["x"],
        t["wd"],
        t["bd"],
        t["wu"],
        t["bu"],
        activation=activation,
        scale=scale,
        residual=t["residual"] if residual else None,
        norm=(t["gamma"], t["beta"], 1e-5) if norm else None,
    )


def test_every_activation_has_a_formula():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize(
    ("scale", "residual", "norm"), [(1.0, False, False), (1.0, True, False), (0.5, False, True), (-2.0, True, True)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_the_formula(activation, scale, residual, norm, dtype, tolerance):
    t = tensors(dtype=dtype)
    got = call(t, activation, scale, residual, norm)
    assert got.dtype is dtype
    torch.testing.assert_close(
        got.double(), naive(t, activation, scale, residual, norm), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize(
    ("norm", "biases", "residual"), [(False, True, False), (True, False, True), (True, True, True)]
)
def test_gradients_without_autograd(activation, norm, biases, residual):
    t = {name: value.requires_grad_() for name, value in tensors(rows=(5,)).items() if name != "residual"}
    down, up = (t["wd"], t["bd"] if biases else None), (t["wu"], t["bu"] if biases else None)
    g, b = (t["gamma"], t["beta"]) if norm else (None, None)
    added, scaled = t["x"] if residual else None, (g, b, 1e-5) if norm else None
    y = adapter(t["x"], *down, *up, activation=activation, scale=-0.7, residual=added, norm=scaled)
    leaves = [t["x"], *down, *up, g, b]
    dy = y.detach().cos()
    with torch.no_grad():
        got = adapter_gradients(dy, t["x"], *down, up[0], g, b, 1e-5, activation, -0.7, residual)
    taking_part = [leaf for leaf in leaves if leaf is not None]
    found = [gradient for gradient, leaf in zip(got, leaves, strict=True) if leaf is not None]
    for one, other in zip(found, torch.autograd.grad(y, taking_part, dy), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activation", FORMULAS)
def test_gradients(activation):
    t = tensors(width=5, size=2, rows=(3,))
    leaves = [value.requires_grad_() for value in t.values()]
    assert torch.autograd.gradcheck(
        lambda *values: call(dict(zip(t, values, strict=True)), activation, 0.7, True, True), leaves
    )


def test_biases_may_be_missing():
    t = tensors()
    zero = {**t, "bd": torch.zeros_like(t["bd"]), "bu": torch.zeros_like(t["bu"])}
    got = adapter(t["x"], t["wd"], None, t["wu"], None)
    assert torch.equal(got, call(zero))


def test_errors_name_the_shapes():
    t = tensors()
    with pytest.raises(ValueError, match=r"x \(2, 3, 6\), down_weight \(3, 7\), down_bias \(3,\), up_weight \(7, 3\)"):
        adapter(t["x"][..., :6], t["wd"], t["bd"], t["wu"], t["bu"])
    with pytest.raises(ValueError, match=r"up_weight \(7, 2\), up_bias \(7,\) do not fit; want x"):
        adapter(t["x"], t["wd"], t["bd"], t["wu"][:, :2], t["bu"])
    with pytest.raises(ValueError, match="activation 'swish'; allowed: gelu, gelu_tanh, relu, silu, tanh"):
        adapter(t["x"], t["wd"], t["bd"], t["wu"], t["bu"], activation="swish")
