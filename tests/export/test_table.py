"""The latency table: its graph has the shapes it says, traces are read right, noise and gaps do not bend the costs."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from compressft.errors import UserError
from compressft.export.table import (
    LONGEST_GAP,
    Deployment,
    Samples,
    build_table,
    grid,
    measure_table,
    quietest,
    sample_model,
    sample_shapes,
    time_samples,
    write_samples,
)
from compressft.export.trace import Timing, read_trace, trace
from compressft.model.shrink import shapes
from compressft.passes.int8 import Int8
from tests.tiny import TINY, padded, tiny

pytestmark = pytest.mark.dear

POINTS = 4


@pytest.fixture(autouse=True, scope="module")
def few_layers():
    """Exporting takes its time per layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressft.export.table.POINTS", POINTS)
        yield


@pytest.fixture(scope="module")
def sample(tmp_path_factory, few_layers):
    """int8 sample models."""
    return write_samples(deployment(), tmp_path_factory.mktemp("table"))


def deployment(family="bert", int8=True, **fields):
    model = tiny(family, vocab_size=600)
    return Deployment(type(model), model.config, padded(), Int8() if int8 else None, rounds=1, **fields)


@pytest.mark.parametrize(("size", "points"), [(1, 12), (3, 12), (12, 12), (16, 12), (64, 12), (1536, 12), (50, 5)])
def test_grids_end_at_the_full_size(size, points):
    sizes = grid(size, points)
    assert sizes[-1] == size and sizes[0] == 1 and len(sizes) <= points
    assert all(a < b for a, b in pairwise(sizes))
    assert len(sizes) >= min(size, points) - 3


def test_grids_keep_to_the_alignment():
    sizes = grid(1536, 12, 32)
    assert sizes[0] == 32 and all(n % 32 == 0 for n in sizes) and len(sizes) == 12
    assert all(b - a <= d - c + 32 for (a, b), (c, d) in pairwise(pairwise(sizes))), "denser where they are small"


class Timer:
    """Times a file as a machine would that takes known times per head and neuron."""

    def __init__(self, noise=0.0, gap=0.001, head=0.5, neuron=0.01):
        self.noise, self.gap, self.head, self.neuron = noise, gap, head, neuron
        self.generator = np.random.default_rng(0)
        self.graphs = []

    def __call__(self, path, batch, length, threads):
        model = onnx.load(str(path))
        self.graphs.append(model)
        owners = [node.name.split("|")[0] for node in model.graph.node]
        nodes = {label: owners.count(label) for label in owners}
        parts = {}
        for label in nodes:
            _, _, kind = label.partition(".")
            size = {"attention": self.heads(model, label), "ffn": self.neurons(model, label)}.get(kind, 0)
            unit = {"attention": self.head, "ffn": self.neuron}.get(kind, 0.0)
            parts[label] = (0.1 + unit * size) * (1 + self.noise * self.generator.standard_normal())
        return Timing(sum(parts.values()) + self.gap * len(owners), parts, nodes)

    @staticmethod
    def heads(model, label):
        """KV heads of the labelled attention, from the weights behind its nodes."""
        tensors = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.name.startswith(f"{label}|") and node.op_type in ("QAttention", "MultiHeadAttention"):
                return next(a.i for a in node.attribute if a.name == "num_heads")
        assert tensors and not label.endswith("attention")
        return 0

    @staticmethod
    def neurons(model, label):
        """Columns of the labelled FFN's first weight."""
        tensors = {t.name: t for t in model.graph.initializer}
        for node in model.graph.node:
            if node.name.startswith(f"{label}|") and node.op_type in ("MatMulIntegerToFloat", "MatMul", "Gemm"):
                dims = next(list(tensors[i].dims) for i in node.input if i in tensors and len(tensors[i].dims) == 2)
                return next(d for d in dims if d != 32) if set(dims) != {32} else 32
        return 0


@pytest.mark.parametrize("int8", [True, pytest.param(False, marks=pytest.mark.full)])
def test_the_table_has_what_the_timer_takes(int8, sample):
    timer, one = Timer(), deployment(int8=int8)
    table = time_samples(sample, one, 1, 16, timer) if int8 else measure_table(one, 1, 16, timer)
    assert table.groups == (1, 2, 3, 4) and table.neurons == (1, 12, 34, 64)
    operators = [node.op_type for node in timer.graphs[1].graph.node]
    assert operators.count("QAttention") == (POINTS if int8 else 0), "what is timed is what ships"
    assert operators.count("MultiHeadAttention") == (1 if int8 else POINTS + 1), "the last layer, or all"
    assert operators.count("MatMulIntegerToFloat") == (3 * POINTS + 6 + 1 if int8 else 0)
    steps = [b - a for a, b in pairwise(table.attention)]
    assert steps == pytest.approx([0.5] * 3, abs=1e-6)
    per_neuron = [
        (b - a) / (n - m) for (a, b), (m, n) in zip(pairwise(table.ffn), pairwise(table.neurons), strict=True)
    ]
    assert per_neuron == pytest.approx([0.01] * (POINTS - 1), abs=1e-6)
    # The gaps are in: an attention of one head takes its nodes' 0.6 and a gap per node.
    assert 0.6 < table.attention[0] < 0.65
    assert table.about["precision"] == ("int8" if int8 else "fp32")
    assert {"threads", "cpu", "onnxruntime", "batch", "length"} <= set(table.about)
    json.dumps(table.model_dump(mode="json"))


def test_noise_never_makes_a_larger_part_cheaper(sample):
    table = time_samples(sample, deployment(), 1, 16, Timer(noise=0.3, head=0.05, neuron=0.001))
    for costs in (table.attention, table.ffn):
        assert all(a <= b for a, b in pairwise(costs))


def test_the_quietest_round_counts(sample):
    times = iter([3.0, 1.0, 2.0])

    def timer(path, batch, length, threads):
        quiet = Timer()(path, batch, length, threads)
        factor = next(times) if path.stem == "sample" else 1.0
        return Timing(quiet.whole * factor, {k: v * factor for k, v in quiet.parts.items()}, quiet.nodes)

    one = deployment()
    one.rounds = 3
    table = time_samples(sample, one, 1, 16, timer)
    assert [b - a for a, b in pairwise(table.attention)] == pytest.approx([0.5] * 3, abs=1e-6)
    low, high = min(table.about["rounds"]), max(table.about["rounds"])
    assert high == pytest.approx(3 * low, rel=1e-3) and len(table.about["rounds"]) == 3


def test_what_tracing_adds_is_taken_off_but_another_process_is_not():
    nodes = {"0.attention": 2, "0.ffn": 3, "rest": 5}
    parts = {"0.attention": 1.0, "0.ffn": 2.0, "rest": 0.5}
    shape = [{"kv_heads": 2, "ffn": 8}]
    samples, short = Samples(Path(), shape, [], first_token=False), Timing(0.0, {}, {})
    for between in (0.002, -0.004):
        table = build_table(samples, Timing(9.0, parts, nodes), short, between, {})
        want = (1.0 + 2 * between, 2.0 + 3 * between, 0.5 + 5 * between)
        assert (table.attention[0], table.ffn[0], table.rest) == pytest.approx(want)
        assert table.cost(shape) == pytest.approx(3.5 + 10 * between)
    busy = build_table(samples, Timing(9.0, parts, nodes), short, 1.0, {})
    assert busy.cost(shape) == pytest.approx(3.5 + 10 * LONGEST_GAP)
    free = build_table(samples, Timing(9.0, dict.fromkeys(parts, 0.001), nodes), short, -0.004, {})
    assert free.attention[0] > 0 and free.ffn[0] > 0


def test_a_last_layer_for_one_token_has_costs_of_its_own():
    small, large = {"kv_heads": 1, "ffn": 8}, {"kv_heads": 4, "ffn": 64}
    samples = Samples(Path(), [small, large, large], [small, small], first_token=True)

    def timing(*layers):
        parts = {f"{i}.{kind}": ms for i, one in enumerate(layers) for kind, ms in one.items()} | {"rest": 0.25}
        return Timing(sum(parts.values()), parts, dict.fromkeys(parts, 1))

    def times(attention, ffn, layer):
        return {"attention": attention, "ffn": ffn, "layer": layer}

    sample = timing(times(1.0, 2.0, 0.5), times(4.0, 9.0, 0.5), times(0.8, 0.3, 0.1))
    table = build_table(samples, sample, timing(times(1.1, 2.1, 0.5), times(0.2, 0.1, 0.1)), 0.0, {})
    assert table.attention == (1.0, 4.0) and table.ffn == (2.0, 9.0) and table.layer == 0.5
    assert table.last.attention == (0.2, 0.8) and table.last.ffn == (0.1, 0.3) and table.last.layer == 0.1
    assert table.cost([small, large]) == pytest.approx(0.25 + 3.5 + 0.8 + 0.3 + 0.1)
    assert table.cost([large]) == pytest.approx(0.25 + 1.2)


@pytest.mark.full
def test_the_measured_last_layer_costs_less(tmp_path):
    """Really timed: at 64 tokens one token's FFN takes a fraction of all tokens'."""
    model = tiny("bert", hidden_size=128, intermediate_size=1024, max_position_embeddings=128, vocab_size=600)
    one = Deployment(type(model), model.config, padded(), Int8(), threads=1, rounds=1)
    table = measure_table(one, 4, 64)
    assert table.last is not None and table.last.ffn[-1] < 0.3 * table.ffn[-1]
    assert table.last.attention_cost(4) < table.attention_cost(4)


@pytest.mark.parametrize("gap", [0.002, -0.003])
def test_the_short_model_tells_what_tracing_adds(sample, gap):
    timer = Timer(gap=gap, head=1.0)
    table = time_samples(sample, deployment(), 1, 16, timer)
    assert table.about["between_nodes"] == pytest.approx(gap, abs=1e-6)
    attention = sum(node.name.startswith("0.attention|") for node in timer.graphs[1].graph.node)
    assert table.attention[0] == pytest.approx(0.1 + 1.0 + attention * gap, abs=1e-6)


def test_a_trace_is_read_by_label_in_the_order_of_time():
    events = [{"cat": "Session", "name": "model_run", "ts": 0, "dur": 99}]
    for run in range(5):
        at = 100 * run
        slow = 40 if run == 2 else 0
        for offset, name, took in (
            (1, "rest|0", 2),
            (10, "0.attention|1", 10 + slow),
            (30, "Gelu_fused", 7),
            (40, "0.ffn|2", 5),
            (50, "0.ffn|3", 6),
        ):
            events.append({"cat": "Node", "name": f"{name}_kernel_time", "ts": at + offset, "dur": took})
            events.append({"cat": "Node", "name": f"{name}_fence_before", "ts": at + offset - 1, "dur": 500})
    parts, nodes = read_trace(list(reversed(events)))
    half = 0.0005
    assert nodes == {"rest": 1, "0.attention": 2, "0.ffn": 2}
    assert parts == pytest.approx({"rest": 0.002 + half, "0.attention": 0.017 + 2 * half, "0.ffn": 0.011 + 2 * half})


@pytest.mark.parametrize("family", TINY)
def test_every_family_has_a_sample_model(family):
    wanted = sample_shapes(deployment(family))
    model = sample_model(deployment(family), wanted)
    present = shapes(model)
    assert [s["kv_heads"] for s in present] == [s["kv_heads"] for s in wanted]
    assert [s["ffn"] for s in present] == [s["ffn"] for s in wanted]
    full = TINY[family][1].get("num_key_value_heads", 4)
    assert {s["kv_heads"] for s in present} == set(range(1, full + 1))
    assert max(s["ffn"] for s in present) == 64 and len({s["ffn"] for s in present}) == POINTS


@pytest.mark.full
def test_measuring_leaves_the_runs_random_numbers_alone(tmp_path):
    one = deployment("qwen3", int8=False)
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    samples = write_samples(one, tmp_path)
    assert torch.equal(torch.rand(3), want)
    onnxruntime_times_it(samples, one)


def onnxruntime_times_it(samples, one):
    """The real thing once: grouped-query attention in fp32, its parts named by another family."""
    one.threads = 1
    table = time_samples(samples, one, 2, 8, trace)
    assert table.last is None, "it reads the last token"
    assert table.groups == (1, 2) and table.neurons[-1] == 64
    assert 0 < table.attention[0] <= table.attention[-1] < 100 and table.ffn[0] > 0 and min(table.layer, table.rest) > 0
    assert table.about["threads"] == 1 and table.about["batch"] == 2


@pytest.mark.parametrize(
    ("whole", "parts", "want"),
    [
        pytest.param((10.6, 10.7), (11.2, 11.3), 10.2, id="quiet: less what tracing adds"),
        pytest.param((60.5, 44.0), (13.0, 12.0), 11.0, id="busy: no whole run was quiet"),
        pytest.param((9.0, 44.0), (14.0, 13.0), 9.0, id="a quiet run"),
    ],
)
def test_a_busy_machine_does_not_slow_the_reference_down(whole, parts, want):
    rounds = [Timing(w, {"rest": p}, {"rest": 250}) for w, p in zip(whole, parts, strict=True)]
    assert quietest(rounds, -0.004) == pytest.approx(want)


@pytest.mark.parametrize(("family", "limit"), [("bert", 40), ("roberta", 38), ("gpt2", 40)])
def test_too_long_inputs_are_refused(family, limit):
    """RoBERTa counts from behind its padding id."""
    with pytest.raises(UserError, match=rf"target.length: {limit + 1} is more than the model's {limit} positions"):
        measure_table(deployment(family), 1, limit + 1, Timer())
