"""Every quantised form against onnxruntime: what torch computes after training is what the written file computes."""

from __future__ import annotations

import copy
import itertools
import warnings

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from compressft.evaluation.logits import open_session
from compressft.export.fold import deployed_linear, fold
from compressft.export.int4 import Int4Embedding
from compressft.export.int8 import Int8Embedding
from compressft.export.onnx import save, to_graph
from compressft.methods.adapter import Adapter
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.gptq import gptq
from compressft.modules.int4 import stored_bytes
from compressft.modules.linear import CompressedLinear
from compressft.modules.quantizer import Int4Quantizer, Int8Quantizer
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.transform import Context
from tests.share import drawn
from tests.tiny import batch_for, logits, tiny

pytestmark = pytest.mark.dear

WIDTHS = (64, 100, 33)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(width, seed, bias):
    new = CompressedLinear(width, 24, bias=bias)
    with torch.no_grad():
        new.weight.copy_(draw(24, width, seed=seed) * (0.1 + draw(24, 1, seed=seed + 1).abs()))
        new.weight[1] = 0.0
        new.weight[2].abs_()
        if bias:
            new.bias.copy_(draw(24, seed=seed + 2))
    return new


def four_bit():
    """Every combination of block, symmetry and accuracy level, on one of the widths each; some on a fixed grid."""
    cases = {}
    for i, (block, symmetric, level) in enumerate(itertools.product((32, 64, 128), (True, False), (0, 4))):
        one = linear(WIDTHS[i % 3], i, bias=i % 2 == 0)
        one.quantizer = Int4Quantizer(block, symmetric, level)
        if i % 5 == 0:
            moments = torch.cov(draw(WIDTHS[i % 3], 300, seed=99))
            one.weight.data, grid = gptq(one.weight.data, moments, block, symmetric)
            one.quantizer.fix(grid)
        cases[f"int4-{block}-{'symmetric' if symmetric else 'asymmetric'}-{level}"] = one
    return cases


def eight_bit():
    cases = {}
    for i, (ranges, bits, form) in enumerate(
        itertools.product(("static", "learned", "dynamic"), (7, 8), ("operators", "qdq"))
    ):
        if (ranges, form) != ("dynamic", "qdq"):
            one = linear(WIDTHS[i % 3], i, bias=i % 2 == 0)
            one.quantizer = Int8Quantizer(ranges, weight_bits=bits, format=form)
            one.quantizer.observe(inputs(WIDTHS[i % 3]) * 0.7, None)
            one.quantizer.settle()
            cases[f"int8-{ranges}-{bits}-{form}"] = one
    return cases


def inputs(width):
    return draw(3, 5, width, seed=7)


class Zoo(nn.Module):
    """Many deployed modules side by side, so that one export shows them all."""

    def __init__(self, modules, places):
        super().__init__()
        self.inner = nn.ModuleList(modules)
        self.places = places

    def forward(self, *xs):
        return [module(xs[place]) for module, place in zip(self.inner, self.places, strict=True)]


def results(modules, places, xs, path, optimise=True):
    zoo = Zoo(modules, places).eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(zoo, xs, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(path))
    return onnx.load(str(path)), execute(path, xs, optimise)


def execute(path, xs, optimise=True, wanted=None):
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {value.name: x.numpy() for value, x in zip(session.get_inputs(), xs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(wanted, feed)]


def by_hand(name, layer, x):
    """In float64: integers and steps as the formats define them, by formulas of this test's own."""
    weight, x = layer.weight.detach().double(), x.double()
    form, *rest = name.split("-")
    if form == "int8":
        peak = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 63
        if rest[1] == "8":
            pairs = torch.nn.functional.pad(weight, (0, weight.shape[1] % 2)).unflatten(1, (-1, 2))
            sums = torch.stack([pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1)])
            peak = sums.amax((0, 2))[:, None].clamp(min=1e-30) / 127
        weight = torch.round(weight / peak) * peak
        low, high = (x.min(), x.max()) if rest[0] == "dynamic" else (layer.quantizer.low, layer.quantizer.high)
        step = (float(high) - float(low)) / 255
        zero = round(-float(low) / step)
        x = ((x / step).round() + zero).clamp(0, 255).sub(zero) * step
    else:
        block = int(rest[0])
        if layer.quantizer.scale is None:
            weight = torch.cat([four(part, rest[1] == "symmetric") for part in weight.split(block, 1)], 1)
        if rest[2] == "4":
            peaks = [part.abs().amax(-1, keepdim=True) / 127 for part in x.split(block, -1)]
            x = torch.cat([(p / peak).round() * peak for p, peak in zip(x.split(block, -1), peaks, strict=True)], -1)
    y = x @ weight.t()
    return y if layer.bias is None else y + layer.bias.detach().double()


def four(part, symmetric):
    if symmetric:
        first = part.gather(1, part.abs().argmax(1, keepdim=True))
        step = torch.where(first == 0, 1.0, first / -8)
        return (part / step).round().clamp(-8, 7) * step
    low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
    step = torch.where(high == low, 1.0, (high - low) / 15)
    zero = (-low / step).round()
    return ((part / step).round() + zero).clamp(0, 15).sub(zero) * step


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    cases = four_bit() | eight_bit()
    xs = tuple(inputs(width) for width in WIDTHS)
    places = [WIDTHS.index(one.in_features) for one in cases.values()]
    deployed = [deployed_linear(copy.deepcopy(one)) for one in cases.values()]
    graph, got = results(deployed, places, xs, tmp_path_factory.mktemp("zoo") / "zoo.onnx")
    return cases, xs, places, deployed, graph, dict(zip(cases, got, strict=True))


CASES = [*four_bit(), *eight_bit()]


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_onnxruntime_and_its_definition(zoo, name):
    cases, xs, places, _, _, got = zoo
    layer, x = cases[name].eval(), xs[places[[*cases].index(name)]]
    with torch.no_grad():
        want, plain = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    spread = float(want.std())
    assert float((got[name] - want).abs().max()) < 2e-5 * spread
    assert float((by_hand(name, layer, x) - want).abs().max()) < 2e-5 * spread
    # The plain product is farther away: quantisation shows.
    if name.startswith("int8") or layer.quantizer.scale is None:
        assert float((plain - want).abs().max()) > 1e-3 * spread


def test_operators_of_the_forms(zoo):
    cases, *_, graph, _ = zoo
    found = [node.op_type for node in graph.graph.node]
    assert found.count("MatMulNBits") == 12 and found.count("DynamicQuantizeMatMul") == 2
    assert found.count("MatMulIntegerToFloat") == 4
    qdq = sum(name.endswith("qdq") for name in cases)
    # Two of the four share their input and its range, and so one DequantizeLinear.
    assert found.count("MatMul") == qdq == 4 and found.count("DequantizeLinear") == 7


def test_four_bit_layers_take_the_bytes_of_the_formula(zoo):
    cases, _, _, deployed, _, _ = zoo
    for (name, layer), module in zip(cases.items(), deployed, strict=True):
        if name.startswith("int4"):
            held = sum(b.nbytes for key, b in module.named_buffers() if key != "bias")
            symmetric = "-symmetric" in name
            assert held == stored_bytes(*layer.weight.shape, layer.quantizer.block, symmetric)
    # 384 x 384 in blocks of 32: half a byte and an eighth of a 4-byte scale.
    assert stored_bytes(384, 384, 32, True) == 384 * 384 // 2 + 384 * 12 * 4


def test_tables_give_the_trained_rows(tmp_path):
    ids = torch.tensor([[7, 0], [4, 19], [3, 3]])
    modules, want = [], []
    for width, (bits, portable) in itertools.product((32, 40, 7), ((8, False), (4, False), (4, True))):
        ours = CompressedEmbedding.of(nn.Embedding(20, width), bits)
        modules.append(Int4Embedding(ours, portable) if bits == 4 else Int8Embedding(ours))
        want.append(ours(ids).detach())
        held = sum(b.nbytes for b in modules[-1].buffers())
        assert held == (20 * (width + 4) if bits == 8 else 20 * (-(-width // 2) + 4 * -(-width // 32)))
    graph, got = results(modules, [0] * len(modules), (ids,), tmp_path / "tables.onnx")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert sum(node.domain != "" for node in graph.graph.node) == 3


def settled(one, family, adapter=False):
    """A one-layer model that has seen one training batch, with the pass settled."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family == "bert" else {}
    model = tiny(family, **quiet, **({"n_layer": 1} if family == "gpt2" else {"num_hidden_layers": 1}))
    if adapter:
        Adapter(placement="pfeiffer", size=5, activation="gelu").prepare(model, Context())
    one.prepare(model, Context())
    one.after_step(model, 0.0)
    with torch.no_grad():
        model.train()(**batch_for(family))
    one.after_step(model, 1.0)
    one.finalize(model)
    return model.eval()


def check(model, path, family, limit):
    """Write the model and compare its logits with onnxruntime's, with its graph optimisations and without."""
    batch = batch_for(family)
    save(to_graph(fold(model), {k: v[:2] for k, v in batch.items()}), path)
    want = logits(model, batch)
    for optimise in (True, False):
        (got,) = execute(path, list(batch.values()), optimise, ["logits"])
        got = got[batch["attention_mask"].bool()] if got.dim() == 3 else got
        assert float((got - want).abs().max() / want.std()) < limit
    return onnx.load(str(path))


@pytest.mark.parametrize(("family", "embeddings"), drawn(1, [("bert", "int8"), ("gpt2", "int4")]))
def test_qdq_models_are_standard_onnx(family, embeddings, tmp_path):
    model = settled(Int8(format="qdq", ranges="learned", embeddings=embeddings), family)
    graph = check(model, tmp_path / "m.onnx", family, limit=0.05)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    found = [node.op_type for node in graph.graph.node]
    linears = sum(isinstance(m, Int8Quantizer) for m in model.modules())
    # One DequantizeLinear per weight; layers that share an input and its range share its pair.
    assert found.count("DequantizeLinear") - found.count("QuantizeLinear") == linears
    assert found.count("QuantizeLinear") <= linears
    # With exact kernels too, for which onnxruntime rewrites weights and zero points: it fails where two share one.
    points = [
        node.input[2] for node in graph.graph.node if node.op_type == "DequantizeLinear" and "weight" in node.input[0]
    ]
    assert len(points) == len(set(points)) >= linears
    open_session(tmp_path / "m.onnx", exact=True)


@pytest.mark.parametrize(("family", "adapter"), [("bert", True), ("llama", False)])
def test_int4_models(family, adapter, tmp_path):
    whole_rows = Int4(block=32, embeddings="int4", embedding_block=128, symmetric=adapter)
    model = settled(whole_rows, family, adapter)
    graph = check(model, tmp_path / "m.onnx", family, limit=1e-4)
    found = [node.op_type for node in graph.graph.node]
    assert found.count("MatMulNBits") == sum(isinstance(m, CompressedLinear) for m in model.modules())
    assert found.count("GatherBlockQuantized") == 1, "the tokens' table"
