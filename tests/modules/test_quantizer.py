"""Int8 arithmetic: equal to onnxruntime's own kernels, straight-through gradients, ranges, and what bf16 keeps."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compressft.modules.gate import ColumnGate
from compressft.modules.int8 import (
    InputGrid,
    activation_scale,
    portable_scale,
    quantise_weight,
    quantised_linear,
    weight_scale,
)
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int8Quantizer


def pair_sums(weight):
    """(out, pairs, sign) sums of adjacent weights of one sign: what a 16-bit sum of products can be made of."""
    even = np.pad(weight, ((0, 0), (0, weight.shape[1] % 2))).reshape(len(weight), -1, 2)
    return np.stack([np.maximum(even, 0).sum(-1), -np.minimum(even, 0).sum(-1)], axis=-1)


def integers(weight):
    """Independent of the source: int8 weight (in, out) and fp32 scales per output channel."""
    peak = pair_sums(weight).max(axis=(1, 2))
    scale = np.where(peak > 0, peak / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(weight / scale[:, None]).astype(np.int8).T.copy(), scale


def session(nodes, initialisers):
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in initialisers.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_static(x, weight, bias, x_scale, zero_point):
    q, scale = integers(weight)
    names = ["q", "w", "xs", "ws", "xz", "", "b"] if bias is not None else ["q", "w", "xs", "ws", "xz"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft"),
    ]
    values = {"w": q, "ws": scale, "xs": np.float32(x_scale), "xz": np.uint8(zero_point)}
    values = {name: np.asarray(value) for name, value in values.items()} | ({} if bias is None else {"b": bias})
    return session(nodes, values).run(None, {"x": x})[0]


def run_dynamic(x, weight, bias):
    q, scale = integers(weight)
    names = ["x", "w", "ws", ""] + (["b"] if bias is not None else [])
    nodes = [helper.make_node("DynamicQuantizeMatMul", names, ["y"], domain="com.microsoft")]
    return session(nodes, {"w": q, "ws": scale} | ({} if bias is None else {"b": bias})).run(None, {"x": x})[0]


def example(k, n, low, high, rows=(3, 5), seed=0, bias=True):
    generator = np.random.default_rng(seed)
    x = generator.uniform(low, high, (*rows, k)).astype(np.float32)
    weight = (generator.standard_normal((n, k)) * generator.uniform(0.01, 2.0, (n, 1))).astype(np.float32)
    return x, weight, generator.standard_normal(n).astype(np.float32) if bias else None


def assert_equal_up_to_rescaling(got, want, bias):
    """The integers agree, so only acc * scale + bias may round differently: two ulps of its larger term."""
    shift = np.zeros(want.shape[-1], np.float32) if bias is None else bias
    unit = np.spacing(np.maximum(np.abs(want - shift), np.abs(shift)).astype(np.float32))
    assert (np.abs(got - want) <= 2 * unit).all()


RANGES = {
    "both signs": (-1.5, 2.5, -1.5, 2.5),
    "positive, without 0": (2.0, 5.0, 2.0, 5.0),
    "negative, without 0": (-5.0, -2.0, -5.0, -2.0),
    "values beyond the range": (-9.0, 9.0, -1.0, 2.0),
    "range far wider than the values": (-2.0, 2.0, -30.0, 50.0),
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize(("k", "n"), [(32, 48), (1536, 24), (7, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_static_equals_onnxruntime(name, k, n, bias):
    low, high, range_low, range_high = RANGES[name]
    x, weight, b = example(k, n, low, high, bias=bias)
    weight[1] = 0.0
    x[0, 0] = 0.0
    scale, zero_point = activation_scale(torch.tensor(range_low), torch.tensor(range_high))
    got = quantised_linear(*as_tensors(x, weight, b), InputGrid(scale, zero_point)).numpy()
    want = run_static(x, weight, b, scale.item(), zero_point.item())
    assert np.ptp(want) > 0
    assert_equal_up_to_rescaling(got, want, b)


@pytest.mark.parametrize(("low", "high"), [(-1.5, 2.5), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0)])
@pytest.mark.parametrize(("k", "n"), [(32, 48), (1536, 24), (7, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_dynamic_equals_onnxruntime(low, high, k, n, bias):
    x, weight, b = example(k, n, low, high, bias=bias)
    weight[1] = 0.0
    quantizer = Int8Quantizer("dynamic")
    tx, tw, tb = as_tensors(x, weight, b)
    assert_equal_up_to_rescaling(
        quantised_linear(tx, tw, tb, quantizer.scale(tx)).numpy(), run_dynamic(x, weight, b), b
    )


def as_tensors(x, weight, bias):
    return torch.from_numpy(x), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias)


def exact(x, weight, bias, scale, zero_point):
    """The same formula in float64, where every product and sum of the integers is exact."""
    q = (torch.round(x / scale) + zero_point).clamp(0, 255).double() - zero_point.double()
    w_scale = portable_scale(weight)
    y = q @ quantise_weight(weight, w_scale).double().t() * (scale.double() * w_scale.double())
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("k", [33, 1536])
def test_bf16_autocast_keeps_the_integers(k):
    x, weight, _ = as_tensors(*example(k, 40, -1.0, 3.0, rows=(64,)))
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(3.0))
    want = exact(x, weight, None, scale, zero_point)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = quantised_linear(x, weight, None, InputGrid(scale, zero_point))
    assert got.dtype is torch.bfloat16
    relative = (got.double() - want).abs() / want.abs().clamp(min=1e-9)
    # Half an ulp of bf16 is 2^-8: once for the accumulator, once for the result.
    assert relative.max() <= (1 + 2**-8) ** 2 - 1 + 1e-6
    # What rounding the dequantised operands to bf16 would give.
    w_scale = portable_scale(weight)
    x_bf16 = ((torch.round(x / scale) + zero_point).clamp(0, 255).sub(zero_point) * scale).bfloat16()
    w_bf16 = (quantise_weight(weight, w_scale) * w_scale[:, None]).bfloat16()
    naive = (x_bf16.double() @ w_bf16.double().t() - want).abs() / want.abs().clamp(min=1e-9)
    assert naive.max() > 10 * relative.max()


def test_bf16_bias_is_added_in_fp32():
    x, weight, bias = as_tensors(*example(64, 16, -1.0, 1.0, rows=(32,)))
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(1.0))
    bare = exact(x, weight, None, scale, zero_point)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = quantised_linear(x, weight, bias, InputGrid(scale, zero_point)).double()
    want = bare + bias.double()
    assert ((got - want).abs() <= 2**-8 * (bare.abs() + want.abs())).all()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_straight_through(bias):
    x, weight, b = as_tensors(*example(24, 10, -2.0, 2.0, bias=bias))
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(1.5))
    leaves = [x.requires_grad_(), weight.requires_grad_()] + ([b.requires_grad_()] if bias else [])
    y = quantised_linear(x, weight, b, InputGrid(scale, zero_point))
    out = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(y, leaves, out)
    dy, s = out.double().reshape(-1, 10), scale.double()
    w_scale = torch.from_numpy(integers(weight.detach().numpy())[1]).double()
    w_q = torch.round(weight.detach().double() / w_scale[:, None])
    level = torch.round(x.detach().double() / s) + zero_point.double()
    inside = (level >= 0) & (level <= 255)
    assert 0 < inside.sum() < inside.numel()
    x_q = (level.clamp(0, 255) - zero_point.double()) * s
    want = [(dy @ (w_q * w_scale[:, None])).view_as(x) * inside, dy.t() @ x_q.reshape(-1, 24), dy.sum(0)]
    for got, reference in zip(grads, want[: len(grads)], strict=True):
        torch.testing.assert_close(got.double(), reference, atol=1e-5, rtol=1e-5)


def test_bf16_gradients_are_near_the_fp32_ones():
    x, weight, b = as_tensors(*example(64, 32, -1.0, 1.0))
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(1.0))
    out = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    results = []
    for on in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, weight, b)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            y = quantised_linear(*leaves, InputGrid(scale, zero_point))
        results.append(torch.autograd.grad(y, leaves, out.to(y.dtype)))
    for fp32, bf16 in zip(*results, strict=True):
        assert bf16.dtype is torch.float32
        assert (fp32 - bf16).norm() <= 2**-6 * fp32.norm()


def test_only_wanted_gradients():
    x, weight, b = as_tensors(*example(8, 4, -1.0, 1.0))
    y = quantised_linear(x.requires_grad_(), weight, b, activation_scale(torch.tensor(-1.0), torch.tensor(1.0)))
    y.sum().backward()
    assert x.grad is not None and weight.grad is None and b.grad is None


def test_saves_bytes_not_floats():
    x, weight, b = as_tensors(*example(64, 8, -1.0, 1.0, rows=(50,)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantised_linear(
            x.requires_grad_(), weight.requires_grad_(), b, activation_scale(torch.tensor(-1.0), torch.tensor(1.0))
        )
    assert sum(t.nbytes for t in saved if t.numel() == x.numel()) == 2 * x.numel()


RANGE_CASES = [(-1.0, 2.0), (0.3, 0.9), (-7.0, -6.0), (-1e-6, 1e-6), (0.0, 0.0), (-1e4, 3e-2), (-3.0, 0.0)]


@pytest.mark.parametrize(("low", "high"), RANGE_CASES)
def test_zero_is_exact_and_error_is_within_half_a_step(low, high):
    scale, zero_point = activation_scale(torch.tensor(low), torch.tensor(high))
    assert scale > 0 and scale.isfinite() and 0 <= zero_point <= 255 and zero_point == zero_point.round()
    eye = torch.eye(1)
    points = torch.linspace(min(low, 0.0), max(high, 0.0), 257)[:, None]
    # One weight of 1 is exact: 127 steps of 1 / 127.
    back = quantised_linear(points, eye, None, InputGrid(scale, zero_point))
    assert quantised_linear(torch.zeros(1, 1), eye, None, InputGrid(scale, zero_point)).item() == 0.0
    # The zero point is rounded too, so an end of the range may lie half a step outside.
    assert (back - points).abs().max() <= scale * 1.001
    assert (back - points).abs()[1:-1].max() <= scale * 0.501 or scale == 1


def test_quantising_again_changes_nothing():
    x, weight, _ = as_tensors(*example(16, 6, -1.0, 2.0))
    scale, zero_point = activation_scale(torch.tensor(-1.0), torch.tensor(2.0))
    w_scale = weight_scale(weight)
    once = quantise_weight(weight, w_scale) * w_scale[:, None]
    assert torch.equal(quantise_weight(once, weight_scale(once)), quantise_weight(weight, w_scale))
    eye = torch.eye(16)
    x_once = quantised_linear(x, eye, None, InputGrid(scale, zero_point))
    torch.testing.assert_close(
        quantised_linear(x_once, eye, None, InputGrid(scale, zero_point)), x_once, atol=0, rtol=0
    )


def test_weight_integers_use_the_whole_symmetric_range():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    q = quantise_weight(weight, weight_scale(weight))
    assert torch.equal(q.abs().amax(1), torch.tensor([127.0, 127.0, 0.0, 127.0, 127.0]))
    assert torch.equal(q, q.round())


def test_ema_after_three_batches():
    quantizer = Int8Quantizer(momentum=0.9)
    assert not quantizer.ready
    batches = [torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, 2.0]), torch.tensor([0.5, 4.0])]
    for batch in batches:
        quantizer.observe(batch, None)
    assert quantizer.ready and int(quantizer.batches) == 3
    assert quantizer.low.item() == pytest.approx(0.9 * (0.9 * -1.0 + 0.1 * -2.0) + 0.1 * 0.5)
    assert quantizer.high.item() == pytest.approx(0.9 * (0.9 * 3.0 + 0.1 * 2.0) + 0.1 * 4.0)


def test_gated_off_columns_do_not_widen_the_range():
    x = torch.tensor([[-1.0, 100.0, 2.0], [0.5, -100.0, 1.0]])
    quantizer = Int8Quantizer()
    quantizer.observe(x, torch.tensor([1.0, 0.0, 1.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == (-1.0, 2.0)


def test_dynamic_ranges_leave_gated_off_columns_out():
    x = torch.tensor([[1.0, 100.0, 2.0], [0.5, -100.0, 1.0]])
    quantizer = Int8Quantizer("dynamic")
    gated = quantizer.scale(x, torch.tensor([1.0, 0.0, 1.0]))
    assert gated == quantizer.scale(x[:, [0, 2]]) and gated != quantizer.scale(x)


def layer(width=16, **settings):
    linear = CompressedLinear(width, 8)
    torch.nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(linear.bias, generator=torch.Generator().manual_seed(1))
    linear.quantizer = Int8Quantizer(**settings)
    return linear


@torch.no_grad()
def test_float_until_a_batch_was_seen():
    linear, x = layer(), torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    plain = torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear.eval()(x), plain)
    seen = linear.train()(x)
    assert not torch.equal(seen, plain)
    assert torch.equal(linear.eval()(x), seen)
    linear.quantizer.active = False
    assert torch.equal(linear(x), plain)


@torch.no_grad()
def test_ranges_move_only_in_training_and_while_observing():
    linear = layer().train()
    linear(torch.ones(2, 16))
    linear.quantizer.observing = False
    linear(torch.full((2, 16), 50.0))
    linear.quantizer.observing = True
    linear.eval()(torch.full((2, 16), 50.0))
    assert int(linear.quantizer.batches) == 1 and linear.quantizer.high == 1.0


@torch.no_grad()
def test_static_rows_do_not_depend_on_their_batch():
    linear, x = layer().train(), torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    linear(x)
    linear.eval()
    outlier = torch.cat([x[:1], 1000.0 * x[1:]])
    assert torch.equal(linear(x)[0], linear(x[:1])[0])
    assert torch.equal(linear(outlier)[0], linear(x)[0])
    # Dynamic ranges do depend on the batch: otherwise this test shows nothing.
    dynamic = layer(ranges="dynamic").eval()
    assert not torch.equal(dynamic(outlier)[0], dynamic(x)[0])


def test_seven_bits_cannot_saturate():
    """Two products of u8 and seven-bit integers fit into signed 16 bits; eight-bit ones do not."""
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    largest = quantise_weight(weight, weight_scale(weight, 7)).abs().max()
    assert largest == 63 and 2 * 255 * largest < 2**15 < 2 * 255 * 127


def hard_weights(n, k, seed=0):
    """Rows in which many pairs reach the bound: equal weights of one sign, of random signs, halves, and drawn ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    weight[0], weight[1 % n] = 1.0, -1.0
    weight[2 % n] = torch.randint(0, 2, (k,), generator=generator) * 2.0 - 1.0
    weight[3 % n] = torch.tensor([63.5, 1.0, 126.0, 0.0])[torch.arange(k) % 4]
    return weight


@pytest.mark.parametrize("m", [1, 2, 5, 17])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 33, 384])
@pytest.mark.parametrize("n", [1, 4, 9, 65])
def test_no_pair_can_saturate_on_this_processor(m, k, n):
    """The largest inputs there are: a default session's sums are the exact ones."""
    weight = hard_weights(n, k)
    x = np.random.default_rng(0).choice([0.0, 128.0, 255.0], (m, k), p=[0.1, 0.1, 0.8]).astype(np.float32)
    q = quantise_weight(weight, portable_scale(weight)).to(torch.int8).t().contiguous().numpy()
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("MatMulIntegerToFloat", ["q", "w", "one", "ones", "zero"], ["y"], domain="com.microsoft"),
    ]
    values = {"w": q, "one": np.float32(1), "ones": np.ones(n, np.float32), "zero": np.uint8(0)}
    got = session(nodes, {name: np.asarray(value) for name, value in values.items()}).run(None, {"x": x})[0]
    assert np.array_equal(got.astype(np.int64), x.astype(np.int64) @ q.astype(np.int64))


@pytest.mark.parametrize("k", [1, 2, 7, 64, 385])
def test_the_portable_grid_is_as_fine_as_its_bound_allows(k):
    weight = hard_weights(12, k) * torch.logspace(-3, 3, 12)[:, None]
    scale = portable_scale(weight)
    q = quantise_weight(weight, scale).numpy()
    assert (255 * pair_sums(q) < 2**15).all() and (pair_sums(q).max((1, 2)) >= 126).all()
    ratio = scale / weight_scale(weight)
    assert (ratio >= 1).all() and (ratio <= 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_stay_within_the_bound(dtype):
    weight = (hard_weights(64, 384) * torch.logspace(-2, 1, 64)[:, None]).to(dtype)
    q = quantise_weight(weight, portable_scale(weight))
    assert q.dtype == dtype and q.abs().max() <= 127
    assert (255 * pair_sums(q.float().numpy()) < 2**15).all()


def test_pairs_are_those_of_the_columns_that_stay():
    """Dropped columns are gone from the file: what was apart there is adjacent, and training knew."""
    weight = torch.tensor([[60.0, 0.0, 100.0, 100.0, 0.0, 80.0], [-1.0, 3.0, 2.0, 2.0, -3.0, 1.0]])
    columns = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    gated = weight * columns
    assert torch.equal(portable_scale(gated, columns), portable_scale(weight[:, columns != 0]))
    assert not torch.equal(portable_scale(gated, columns), portable_scale(gated))
    linear, x = layer(ranges="dynamic"), torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    linear.gates["structured"] = ColumnGate(16, 1)
    linear.gates["structured"].mask[[0, 3, 4, 9]] = 0.0
    live = linear.gates["structured"].mask != 0
    with torch.no_grad():
        got = linear.eval()(x)
        linear.fold()
        small = layer(ranges="dynamic", width=12)
        small.weight.copy_(linear.weight[:, live])
        small.bias.copy_(linear.bias)
        assert torch.equal(small.eval()(x[:, live]), got)


def test_all_eight_bits_where_they_are_asked_for():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    grids = {t: Int8Quantizer(target=t).weight_scale(weight) for t in ("any", "vnni")}
    assert torch.equal(grids["vnni"], weight_scale(weight)) and torch.equal(grids["any"], portable_scale(weight))
    assert torch.equal(Int8Quantizer(weight_bits=7).weight_scale(weight), weight_scale(weight, 7))


def test_a_folder_that_names_no_grid_keeps_the_one_it_was_trained_with():
    old = Int8Quantizer.rebuild(None, {"ranges": "static", "momentum": 0.99, "weight_bits": 8, "format": "operators"})
    new = Int8Quantizer.rebuild(None, Int8Quantizer().describe())
    assert (old.target, new.target) == ("vnni", "any")


def test_per_channel_errs_less_than_per_tensor():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 16)[:, None]
    whole = weight_scale(weight.reshape(1, -1)).expand(16)
    errors = [(quantise_weight(weight, s) * s[:, None] - weight).abs().amax(1) for s in (weight_scale(weight), whole)]
    assert (errors[0] <= errors[1] + 1e-6).all() and errors[0].sum() < 0.5 * errors[1].sum()


def test_noise_rounds_a_random_share_in_training_only():
    torch.manual_seed(0)
    linear = layer(ranges="dynamic")
    with torch.no_grad():
        eye = torch.eye(16)
        linear.bias.zero_()
        whole = linear.eval()(eye).t()
        linear.quantizer.rate = 0.3
        assert torch.equal(linear(eye).t(), whole)
        first, second = (linear.train()(eye).t() for _ in range(2))
    share = torch.isclose(first, whole, rtol=1e-5, atol=1e-7).float().mean()
    assert 0.15 < share < 0.45 and not torch.equal(first, second)
    # What was not rounded is the weight itself, but for the inputs' own rounding.
    near = torch.minimum((first - whole).abs(), (first - linear.weight.detach()).abs())
    assert float(near.max()) < 1e-5


def learned(low, high, batches=17):
    """A quantizer whose range is learned from here on."""
    quantizer = Int8Quantizer("learned").train()
    with torch.no_grad():
        quantizer.low.fill_(low)
        quantizer.high.fill_(high)
        quantizer.batches.fill_(batches)
    return quantizer


def test_range_gradient_is_that_of_the_rounding():
    """Where values are clipped the ends move the output as finite differences say; inside, each by its own error."""
    quantizer = learned(-1.0, 2.0)
    x = torch.tensor([[-3.0, 5.0, 4.0, -2.0]])
    weight = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    quantizer.linear(x, weight, None, None).sum().backward()
    factor = (4 * 255) ** -0.5
    # Two values stick at each end: the weights say by how much the output follows.
    assert quantizer.high.grad.item() == pytest.approx((2.0 + 3.0) * factor, rel=0.02)
    assert quantizer.low.grad.item() == pytest.approx((1.0 - 4.0) * factor, rel=0.02)
    inside = learned(-1.0, 2.0)
    x = torch.tensor([[0.3, 0.7, -0.2, 1.1]])
    inside.linear(x, weight, None, None).sum().backward()
    scale, _ = activation_scale(torch.tensor(-1.0), torch.tensor(2.0))
    error = torch.round(x / scale) - x / scale
    want = float((error * weight).sum() / 255 * factor)
    assert inside.high.grad.item() == pytest.approx(want, rel=0.05)
    assert inside.low.grad.item() == pytest.approx(-want, rel=0.05)


def test_learned_ranges_beat_minimum_and_maximum():
    """A lone outlier costs all other values their precision; the gradient gives it up."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 16, generator=generator), torch.randn(8, 16, generator=generator)
    x[0, 0] = 400.0
    want = (x @ weight.t())[1:]
    quantizer = learned(float(x.min()), float(x.max()))
    optimiser = torch.optim.Adam(quantizer.parameters(), lr=4.0)
    losses = []
    for _ in range(150):
        loss = (quantizer.linear(x, weight, None, None)[1:] - want).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert min(losses[-10:]) < 0.1 * losses[0] and float(quantizer.high.detach()) < 300


def test_learned_ranges_start_from_the_first_batches_and_end_static():
    quantizer = Int8Quantizer("learned").train()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    lows = []
    for i in range(20):
        quantizer.observe(x * (1 + i), None)
        lows.append(float((x * (1 + i)).min()))
        y = quantizer.linear(x, torch.eye(8).requires_grad_(), None, None)
        quantizer.low.grad = None
        y.sum().backward()
        assert (quantizer.low.grad is None) == (i < 16)
    assert quantizer.low.item() == pytest.approx(sum(lows[:16]) / 16, rel=1e-5)
    quantizer.observing = False
    assert not quantizer.linear(x, torch.eye(8), None, None).requires_grad
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.settle()
    assert not list(quantizer.parameters()) and quantizer.describe()["ranges"] == "static"
    assert before.keys() == quantizer.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
