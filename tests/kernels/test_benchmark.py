"""The operators' benchmark: it finds what is wrong, counts what it says, times the same work for all, and tunes."""

import ast
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressft_kernels import dispatch, launch_triton
from compressft_kernels.benchmark import cases, correctness, peers, run, shapes, timing
from compressft_kernels.benchmark.cases import BOTH, FORWARD, Way

from benchmarks import ops, tune

pytestmark = pytest.mark.dear

CPU, SINGLE = torch.device("cpu"), torch.float32
CEILINGS = {"bytes_per_second": 1e10, "flops_per_second": 1e11}
FOLDER = Path(cases.__file__).parent


def named(name, among):
    return next(case for case in among if f"{case.operation} {case.name}".startswith(name))


@pytest.fixture
def packed():
    return cases.packed((6,), 16, 24)


# Correctness.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_operator_is_right_on_the_cpu(dtype):
    rows = correctness.suite(shapes.checks(), CPU, [dtype])
    assert {row["operation"] for row in rows} == set(dispatch.OPERATIONS)
    assert [row for row in rows if not row["right"]] == []
    assert {"y", "x", "scores", "bias", "blocks", "gamma", "down_weight", "prefix_k"} <= {row["of"] for row in rows}


def verdict(got, peer, truth):
    as_double = torch.tensor(truth, dtype=torch.float64)
    return correctness.verdict(torch.tensor(got), [torch.tensor(p) for p in peer], as_double, SINGLE)


def test_twice_the_error_of_pytorch_is_allowed_and_no_more():
    # Exact in float32: the error of PyTorch is 1/8, one rounding of the largest value 2 * 2**-23.
    allowed = 0.25 + 2**-22
    found = verdict([1.25, 2.0], [[1.0, 2.125]], [1.0, 2.0])
    assert (found["error"], found["torch_error"], found["allowed"]) == (0.25, 0.125, allowed)
    assert found["right"]
    assert not verdict([1.0, 2.2501], [[1.0, 2.125]], [1.0, 2.0])["right"]
    # The least exact of what PyTorch has counts.
    assert verdict([1.0, 2.2501], [[1.0, 2.125], [1.25, 2.0]], [1.0, 2.0])["right"]
    # Where PyTorch is exact: one rounding; where there is nothing but zeros: none.
    assert verdict([1.0, 2.0 + 2**-22], [[1.0, 2.0]], [1.0, 2.0])["right"]
    assert not verdict([1.0, 2.0 + 2**-21], [[1.0, 2.0]], [1.0, 2.0])["right"]
    assert verdict([0.0], [[0.0]], [0.0])["right"]
    assert not verdict([1e-30], [[0.0]], [0.0])["right"]


def test_a_kernel_that_does_not_compile_is_wrong(packed, monkeypatch):
    """Plain torch in its place has the right results, and its times are not the kernel's."""
    monkeypatch.setattr(dispatch, "_failures", {("packed_linear", "cpu"): "_product_kernel does not compile there"})
    assert correctness.red(correctness.suite([packed], CPU, [SINGLE])) == {
        "packed_linear": "all of 6 16x24 in float32: _product_kernel does not compile there"
    }


def test_nan_other_shapes_and_other_dtypes_are_wrong():
    assert not verdict([float("nan")], [[1.0]], [1.0])["right"]
    assert not verdict([1.0, 1.0], [[1.0]], [1.0])["right"]
    half = correctness.verdict(torch.ones(1).half(), [torch.ones(1)], torch.ones(1).double(), SINGLE)
    assert not half["right"] and "float16" in half["reason"]


class Doubling(torch.autograd.Function):
    """Right forward, a gradient twice too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def raising(o):
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        (lambda case: lambda o: case.naive(o) * 1.01, "y of 6 16x24 in float32: error"),
        (lambda case: lambda o: Doubling.apply(case.naive(o)), "x of 6 16x24 in float32: error"),
        (lambda case: raising, "all of 6 16x24 in float32: RuntimeError: no such kernel"),
    ],
)
def test_a_wrong_operator_gets_no_ratio(packed, tmp_path, monkeypatch, capsys, ours, reason):
    broken = replace(packed, ours=ours(packed))
    right = cases.adapter((6,), 16, 4)
    document = run.measure(
        ("packed_linear", "adapter"), quick=True, cases=[packed, right], checks=[broken, packed, right]
    )
    assert set(document["wrong"]) == {"packed_linear"}
    assert document["wrong"]["packed_linear"].startswith(reason)
    tables = run.summary(document)
    assert list(tables) == ["packed_linear", "adapter"]
    assert [len(rows) for rows in tables.values()] == [2, 2]
    for row in document["rows"]:
        is_wrong = row["operation"] == "packed_linear"
        assert (row["ratio"] is None, row["ratio_eager"] is None, row["roofline"] is None) == (is_wrong,) * 3
        assert row["ms"] > 0
    for operation, rows in tables.items():
        for printed in rows:
            assert [printed[key] == "wrong" for key in ("x best", "x eager")] == [operation == "packed_linear"] * 2
    # The command says so, prints no ratio either, and fails.
    monkeypatch.setattr(ops, "measure", lambda *_, **__: document)
    assert ops.main(["--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 1
    text = capsys.readouterr().out
    assert "packed_linear is wrong" in text
    section = text.split("## packed_linear")[1].split("##")[0]
    assert "| wrong | wrong | - |" in section
    assert "x |" not in section


@pytest.mark.parametrize("which", [FORWARD, BOTH])
def test_wrong_at_a_timed_size_alone_is_found(packed, which):
    slightly = replace(packed, ours=lambda o: packed.naive(o) * (1 + 1e-4))
    row = run.measure_case(slightly, which, CPU, SINGLE, CEILINGS, seconds=0.0)
    assert row["ratio"] is None and row["wrong"].startswith("y at this size: off by")
    gradients = replace(packed, ours=lambda o: Doubling.apply(packed.naive(o)))
    row = run.measure_case(gradients, which, CPU, SINGLE, CEILINGS, seconds=0.0)
    assert (row["wrong"] is None) == (which == FORWARD)
    row = run.measure_case(replace(packed, ours=raising), which, CPU, SINGLE, CEILINGS, seconds=0.0)
    assert row["wrong"] == "RuntimeError: no such kernel" and row["ms"] is None and row["ratio"] is None


def test_checks_in_processes_are_the_same():
    wanted = [case if case.name == "3x5 d64 r16" else None for case in shapes.checks()]
    alone = correctness.suite([case for case in wanted if case is not None], CPU, [SINGLE])
    apart = correctness.suite_in_processes(wanted, CPU, [SINGLE], 1)
    keys = ("operation", "case", "dtype", "of", "right")
    assert [[row[key] for key in keys] for row in apart] == [[row[key] for key in keys] for row in alone]
    assert len(apart) == 6


# What the roofline counts.

ROOFLINES = {
    # 10 tokens of 4, r = 2, parameters 2 * 8 + 4 + 2 = 22 (30 with a norm); products of 2 * 10 * 8 twice.
    "adapter": (cases.adapter((2, 5), 4, 2), (102, 0), (266, 0), 320, 960),
    "adapter with norm": (cases.adapter((2, 5), 4, 2, norm=True), (110, 0), (290, 0), 320, 960),
    # x 10 * 4, y 10 * 6, weight and scores 24 each.
    "masked": (cases.masked((10,), 6, 4), (148, 0), (444, 0), 480, 1440),
    # The weight in 12 bytes and one scale of 4.
    "masked NF4": (cases.masked((10,), 6, 4, nf4=True), (124, 16), (372, 48), 480, 1440),
    # A byte of mask for each of the 6 rows.
    "packed": (cases.packed((10,), 6, 4), (124, 6), (248, 12), 480, 960),
    "packed NF4": (cases.packed((10,), 6, 4, nf4=True, mask=False), (100, 16), (200, 32), 480, 960),
    # 2 of 4 tiles of 3 * 2 live.
    "block sparse": (cases.block_sparse((10,), 6, 4, (3, 2), density=0.5), (112, 0), (336, 0), 240, 720),
    # q and o 2 * 4 * 3 * 5 each, k and v 2 * 2 * 7 * 5 each, prefix 2 * 6 * 5 each; 3 * 13 pairs for 8 heads.
    "prefix": (cases.prefix(2, 4, 2, 3, 7, 5, 6), (640, 0), (1920, 0), 6240, 21840),
    # Causal with 7 own keys: the 3 queries see 5, 6 and 7 of them: 36 pairs.
    "prefix causal": (cases.prefix(2, 4, 2, 3, 7, 5, 6, causal=True), (640, 0), (1920, 0), 5760, 20160),
}


@pytest.mark.parametrize("name", ROOFLINES)
def test_bytes_and_flops(name):
    case, forward, both, flops, flops_both = ROOFLINES[name]
    assert case.bytes(FORWARD, 2) == 2 * forward[0] + forward[1]
    assert case.bytes(BOTH, 4) == 4 * both[0] + both[1]
    assert (case.flops[FORWARD], case.flops[BOTH]) == (flops, flops_both)


def test_bytes_are_those_of_the_operands(packed):
    """The forward's bytes are what the operands hold, and the output."""
    for case in shapes.quick():
        if case.operation == "block_sparse_linear":  # has also what only eager PyTorch reads
            continue
        operands = case.make(CPU, SINGLE, 0)
        held, y = timing.held(operands), case.ours(operands)
        small = 4 * sum(o.numel() for name, o in operands.items() if name == "bias")
        small += 4 * 16 * ("NF4" in case.name)
        assert case.bytes(FORWARD, 4) == held - small + y.numel() * 4, case.name


def test_roofline_is_the_slower_of_bytes_and_flops(packed, monkeypatch):
    monkeypatch.setattr(timing, "medians", lambda works, *_: {n: timing.Times(2.0, 1.0, None, 9) for n in works})
    slow_memory = {"bytes_per_second": 1e3 * packed.bytes(FORWARD, 4), "flops_per_second": 1e12}
    row = run.measure_case(packed, FORWARD, CPU, SINGLE, slow_memory)
    assert (row["ideal_ms"], row["bound_by"], row["roofline"], row["ratio"]) == (1.0, "bytes", 0.5, 1.0)
    slow_products = {"bytes_per_second": 1e15, "flops_per_second": 5e2 * packed.flops[BOTH]}
    row = run.measure_case(packed, BOTH, CPU, SINGLE, slow_products)
    assert (row["ideal_ms"], row["bound_by"], row["roofline"]) == (2.0, "flops", 1.0)


# Peers.


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", shapes.quick(), ids=lambda case: f"{case.operation} {case.name}")
def test_peers_compute_the_same(case, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(peers, "_compiled_flex", lambda: flex_attention)
    operands = case.make(CPU, SINGLE, 0)
    truth = correctness.results(case.truth, cases.upcast(operands), case.leaves)
    ways = {"eager": Way(case.naive), **case.peers, **ops.more_peers(case, CPU)}
    assert len(ways) == {"adapter": 1, "prefix_attention": 4}.get(case.operation, 3 if "NF4" in case.name else 2)
    for name, way in ways.items():
        o = operands | (way.prepare(operands) if way.prepare else {})
        leaves = way.leaves or case.leaves
        # FlexAttention on the CPU has no backward; on a GPU it has.
        got = {"y": way.call(o)} if name == "FlexAttention" else correctness.results(way.call, o, leaves)
        for of in set(got) & set(truth) if way.same else ():
            error = (got[of].double() - truth[of]).abs().max() / truth[of].abs().max()
            assert error < 1e-5, (name, of)
        assert way.same or (got["y"].double() - truth["y"]).abs().max() > 0.1


def test_merged_calls_read_one_query_and_grouped_heads():
    for case in (cases.prefix(3, 4, 2, 1, 9, 16, 5, causal=True), cases.prefix(2, 6, 2, 8, 8, 16, 5)):
        operands = case.make(CPU, SINGLE, 0)
        truth = correctness.results(case.truth, cases.upcast(operands), case.leaves)
        got = correctness.results(case.peers["flash twice"].call, operands, case.leaves)
        for name, tensor in got.items():
            torch.testing.assert_close(tensor.double(), truth[name], atol=1e-5, rtol=0.0)


def test_exact_float32_is_timed_by_dispatch_and_by_the_kernel():
    """In both passes, whatever dispatch makes of it; the checks are the kernels' too."""
    seen = []

    def call(name):
        def by(o):
            seen.append((name, dispatch._kernels_for_float32, o["x"].dtype))
            y = Doubling.apply(o["x"])
            if y.requires_grad:
                y.register_hook(lambda _: seen.append((f"{name} backward", dispatch._kernels_for_float32, None)))
            return y

        return by

    case = cases.masked((6,), 16, 24)
    exact = cases.in_float32(replace(case, ours=call("ours"), naive=case.naive, leaves=("x",)))
    row = run.measure_case(exact, BOTH, CPU, torch.float16, CEILINGS, wrong="not looked at", seconds=0.0)
    assert exact.name == "6 16x24 float32" and set(row["peers"]) == {"eager", "kernel"}
    assert set(seen) == {
        (f"ours{of}", within, None if of else torch.float32) for of in ("", " backward") for within in (False, True)
    }
    seen.clear()
    correctness.check(exact, CPU, SINGLE)
    assert {within for _, within, _ in seen} == {True}


def test_best_peer_is_the_fastest_that_computes_the_same(monkeypatch):
    case = cases.masked((6,), 16, 24)
    ms = {"ours": 4.0, "eager": 6.0, "dense": 1.0, "other": 5.0}
    found = {name: timing.Times(value, value, None, 9) for name, value in ms.items()}
    monkeypatch.setattr(timing, "medians", lambda works, *_: {name: found[name] for name in works})
    row = run.measure_case(case, FORWARD, CPU, SINGLE, CEILINGS, more={"other": Way(case.naive)})
    assert (row["best_peer"], row["ratio"], row["ratio_eager"]) == ("other", 1.25, 1.5)
    assert not row["peers"]["dense"]["same"]


def test_a_peer_that_fails_is_named_with_the_reason(packed, monkeypatch):
    def no_compiler(o):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n  in ...")

    monkeypatch.setattr(run, "compiled", lambda case, device: Way(no_compiler, compiles=True))
    row = run.measure_case(packed, FORWARD, CPU, SINGLE, CEILINGS, compiling=run.Compiling(1.0), seconds=0.0)
    assert row["skipped"] == {"torch.compile": "RuntimeError: InvalidCxxCompiler: No working C++ compiler found"}
    assert row["ratio"] > 0
    row = run.measure_case(packed, FORWARD, CPU, SINGLE, CEILINGS, compiling=run.Compiling(0.0), seconds=0.0)
    assert row["skipped"] == {"torch.compile": "the time for compiling was spent"}


# Time and memory.


def test_ways_are_timed_in_turns_on_the_next_inputs(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "clock", lambda device: lambda call: (call.run(), None))

    def call(name, ms):
        return timing.Call(lambda: order.append(name) or ms)

    works = {"a": [call("a0", 1.0), call("a1", 5.0)], "b": [call("b0", 2.0)]}
    found = timing.medians(works, CPU, 0.0, least=16)
    assert order[:3] == ["a0", "a1", "b0"]  # warm-up
    rounds = [order[place : place + 2] for place in range(3, len(order), 2)]
    assert [sorted(turn) for turn in rounds] == [["a0", "b0"], ["a1", "b0"]] * 8
    assert len({turn[0][0] for turn in rounds}) == 2  # either comes first at times
    assert (found["a"].least_ms, found["b"].ms, found["a"].samples) == (1.0, 2.0, 16)


def test_median_of_the_quietest_third():
    samples = [(ms, None) for ms in (9.0, 8.0, 9.0, 1.0, 7.0, 2.0, 5.0, 4.0, 6.0)]
    assert timing._median(samples, 3).ms == 2.0
    assert timing._median(samples, 1).ms == 6.0


def test_scores_change_before_every_call_and_not_while_it_is_timed():
    case = cases.masked((6,), 16, 24, changed=True)
    operands = case.make(CPU, SINGLE, 0)
    for which in (FORWARD, BOTH):
        seen = []
        way = Way(lambda o, seen=seen: seen.append(o["scores"].clone()) or case.naive(o))
        call = run.calls(case, way, [operands], which)[0]
        call.before()
        call.run()
        call.before()
        call.run()
        torch.testing.assert_close(seen[-1], -seen[-2], atol=0.0, rtol=0.0)


def test_masked_linear_saves_nothing_as_large_as_its_weight():
    case = named("masked_linear 64 96x128", shapes.quick())
    row = run.measure_case(case, BOTH, CPU, SINGLE, CEILINGS, seconds=0.0)
    assert row["saved"]["ours"] == {"bytes": 0, "weights": 0}
    assert row["saved"]["eager"] == {"bytes": 4 * 96 * 128, "weights": 1}


def test_saved_tensors_are_counted_once_and_without_operands():
    x = torch.ones(8, requires_grad=True)

    def twice():
        y = x.exp()  # saves its own output
        return y * y

    assert timing.saved(twice, {"x": x}, 8) == {"bytes": 32, "weights": 1}
    assert timing.saved(twice, {"x": x}, 9) == {"bytes": 32, "weights": 0}
    assert timing.saved(lambda: x * x, {"x": x}, 1) == {"bytes": 0, "weights": 0}


def test_held_bytes_count_each_storage_once():
    x = torch.zeros(4, 4)
    assert timing.held({"x": x, "part": x[1], "none": None, "list": [torch.zeros(2, dtype=torch.uint8)]}) == 66


def test_gradients_are_asked_for_in_the_second_pass_alone(packed):
    operands = packed.make(CPU, SINGLE, 0)
    forward, both = (run.calls(packed, Way(packed.ours), [operands], which)[0].run() for which in (FORWARD, BOTH))
    assert not forward.requires_grad
    assert [tuple(t.shape) for t in both] == [(6, 16), (6, 24), (16,)]


# The document.


@pytest.fixture(scope="module")
def quick():
    return run.measure(quick=True, checks=shapes.checks()[::7])


def test_quick_measures_every_operator(quick):
    assert (quick["device"], quick["dtype"], quick["wrong"], quick["not_measured"]) == ("cpu", "float32", {}, [])
    assert len(quick["rows"]) == 2 * len(shapes.quick())
    assert {row["operation"] for row in quick["rows"]} == set(dispatch.OPERATIONS)
    for row in quick["rows"]:
        best = row["peers"][row["best_peer"]]
        assert row["ratio"] == best["ms"] / row["ms"] > 0
        assert all(found["ms"] >= best["ms"] for found in row["peers"].values() if found["same"])
        assert row["samples"] >= 9
    assert quick["ceilings"]["bytes_per_second"] > 1e7
    json.dumps(quick)


def test_time_that_is_up_is_said(packed):
    document = run.measure(("packed_linear",), quick=True, cases=[packed], checks=[packed], seconds=0.0)
    assert document["not_measured"] == [f"packed_linear 6 16x24, {which}" for which in (FORWARD, BOTH)]


def test_unknown_operator_is_named():
    with pytest.raises(ValueError, match="operation 'sorting'; there are adapter, "):
        run.measure(("adapter", "sorting"))


def test_shapes_of_both_devices_are_distinct_and_cover_every_operator():
    for listed in (shapes.checks(), shapes.quick(), shapes.cpu(), shapes.cuda()):
        names = [f"{case.operation} {case.name} {case.leaves}" for case in listed]
        assert {case.operation for case in listed} == set(dispatch.OPERATIONS)
        if listed[0].name != shapes.checks()[0].name:
            assert len(set(names)) == len(names)
    assert sum(case.compile for case in shapes.cuda()) == len(shapes.COMPILED)


def test_command_writes_json_and_a_table(tmp_path, capsys):
    path = tmp_path / "new" / "rows.json"
    assert ops.main(["--device", "cpu", "--quick", "--only", "packed_linear", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["command"].startswith("python -m benchmarks ops --device cpu --quick")
    assert {"date", "hardware", "versions", "ceilings", "correctness", "rows", "tuned"} <= set(document)
    text = path.with_suffix(".md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    head = next(line for line in text.splitlines() if line.startswith("| case"))
    rows = [line for line in text.splitlines() if line.startswith("| 64 ")]
    assert len(rows) == len(document["rows"]) == 4
    assert {line.count("|") for line in rows} == {head.count("|")}
    assert "bitsandbytes" in head and "saved: ours / eager" in head


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_without_a_gpu(capsys):
    assert ops.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err == "--device cuda: torch finds no GPU\n"


# Tuning.

FACTS = {"bytes": 2, "weight": "dense", "weight_bytes": 2}


@pytest.fixture
def table(monkeypatch):
    """A copy of the table, in which to tune."""
    table = copy.deepcopy(dispatch.TABLE)
    monkeypatch.setattr(dispatch, "TABLE", table)
    return table


def choose(rows, kernel="product"):
    return dispatch.configuration(kernel, [e for e in ("A GPU", "sm_90") if e in dispatch.TABLE], rows=rows, **FACTS)


def scored(times, kernel="product"):
    """A score that asks for a configuration as an operator does, and takes its time from it."""

    def score(rows):
        return times(choose(rows, kernel))

    return score


def test_tuner_keeps_the_fastest_and_dispatch_returns_it(table, tmp_path):
    generic, before, others = copy.deepcopy(table["sm_90"]), choose(16), choose(300)
    doubled = before | {"BLOCK_O": before["BLOCK_O"] * 2}
    warps = before | {"num_warps": 8}
    staged = before | {"num_stages": before["num_stages"] - 1}

    def times(config):
        if config == staged:
            return None  # spills, or is wrong
        return {str(doubled): 2.0, str(warps): 3.0}.get(str(config), 4.0)

    said = []
    changes = tune.tune([10, 16], "A GPU", "sm_90", scored(times), 60.0, said.append)
    assert changes == said and len(changes) >= 1
    assert "0.50 of the time" in changes[-1]
    assert choose(16) == doubled and choose(3) == doubled
    assert choose(300) == others  # no case fell on this row
    assert table["sm_90"] == generic
    assert set(table["A GPU"]) == {"product", "limits"}
    tune.write(table, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == table
    # The next run starts from there and finds nothing better.
    assert tune.tune([10, 16], "A GPU", "sm_90", scored(times), 60.0, said.append) == []
    assert choose(16) == doubled


@pytest.mark.parametrize("times", [lambda config: 1.0, lambda config: None])
def test_tuner_that_finds_nothing_leaves_no_entry(table, times):
    before = copy.deepcopy(table)
    assert tune.tune([16, 300], "A GPU", "sm_90", scored(times), 60.0) == []
    assert table == before


def test_tuner_needs_more_than_noise_and_stops_in_time(table):
    before = choose(16)
    assert tune.tune([16], "A GPU", "sm_90", scored(lambda c: 1.0 if c == before else 0.99), 60.0) == []
    tried = []
    score = scored(lambda config: tried.append(config) or 1.0)
    assert tune.tune([16], "A GPU", "sm_90", score, 0.0) == []
    assert all(config == before for config in tried)


def test_tuner_finds_thresholds(table):
    def score(rows):
        threshold = dispatch.limit("scratch_rows_nf4", [e for e in ("A GPU", "sm_90") if e in dispatch.TABLE])
        return 1.0 if threshold is not None and rows >= threshold else 2.0

    assert tune.tune([100, 1000], "A GPU", "sm_90", score, 60.0, lambda line: None)
    assert table["A GPU"]["limits"]["scratch_rows_nf4"] == 64
    assert table["sm_90"]["limits"]["scratch_rows_nf4"] == 256


class Compiled:
    """A kernel that does nothing, and says how much it spills."""

    def __init__(self, spills):
        self.n_spills = spills

    def __getitem__(self, grid):
        return lambda *args, **options: self


class Launching(torch.autograd.Function):
    """Launches one kernel forward and another backward."""

    @staticmethod
    def forward(ctx, x, first, second):
        launch_triton.launch(first, (1,), x)
        ctx.second = second
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        launch_triton.launch(ctx.second, (1,), dy)
        return dy, None, None


@pytest.mark.parametrize(("spills", "fits"), [((0, 0), True), ((8, 0), False), ((0, 8), False)])
def test_what_spills_has_no_time(packed, spills, fits):
    kernels = [Compiled(count) for count in spills]
    launching = replace(packed, ours=lambda o: Launching.apply(packed.ours(o), *kernels))
    ms = tune.Timer(CPU, SINGLE)(launching)
    assert (ms is not None and ms > 0) if fits else ms is None


@pytest.mark.parametrize("ours", [lambda case: raising, lambda case: lambda o: Doubling.apply(case.naive(o))])
def test_what_fails_or_is_wrong_has_no_time(packed, ours):
    assert tune.Timer(CPU, SINGLE)(replace(packed, ours=ours(packed))) is None


def test_neighbours_stay_within_what_compiles():
    config = {"BLOCK_T": 16, "BLOCK_O": 256, "GROUP": 8, "num_warps": 8, "num_stages": 1, "maxnreg": 255}
    found = tune.neighbours(config)
    changed = [{name: other[name] for name in other if other[name] != config[name]} for other in found]
    assert changed == [{"BLOCK_T": 32}, {"BLOCK_O": 128}, {"num_warps": 4}, {"num_stages": 2}]


def test_shipped_table_is_written_as_it_is(tmp_path):
    tune.write(dispatch.TABLE, tmp_path / "table.json")
    assert json.loads((tmp_path / "table.json").read_text()) == dispatch.TABLE


# Its place.


def test_knows_torch_alone_and_is_loaded_by_no_one():
    allowed = {"torch", "compressft_kernels", *sys.stdlib_module_names}
    for path in [*FOLDER.glob("*.py"), *FOLDER.parent.rglob("*.py")]:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        if path.parent == FOLDER:
            assert {name.split(".")[0] for name in names} <= allowed, path
        else:
            assert not [name for name in names if name.startswith("compressft_kernels.benchmark")], path
