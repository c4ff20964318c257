"""Benchmark cases: run once by the hash of what was asked, on top of the cases that they read."""

import io
import json
from argparse import ArgumentTypeError

import pytest
from rich.console import Console

from benchmarks import cases as engine
from benchmarks import methods, methods_choice
from benchmarks.__main__ import main as benchmark
from benchmarks.cases import Case, run_cases
from benchmarks.compression import cases
from benchmarks.methods_table import claims
from benchmarks.options import positive
from compressft.errors import UserError
from compressft.recipe.recipe import parse_recipe
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

pytestmark = pytest.mark.dear


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A dense case and a pruned one that starts from it, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMPRESSFT_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "rows.jsonl", rows_of(24))
    save_tiny(tmp_path / "base")

    def case(name, model, after=(), passes=(), keep=False):
        train = {"max_steps": 2, "batch_size": 4, "precision": "fp32"}
        recipe = {
            "name": name,
            "model": model,
            "data": {"train": "{data}/rows.jsonl", "max_length": 16},
            "stages": [{"name": "only", "passes": list(passes), "train": train}],
            "export": {"enabled": False},
        }
        return Case(name, "group", recipe, after, keep, {"kind": name})

    pruned = [{"type": "magnitude", "sparsity": 0.5, "start": 0.0}]
    return [case("dense", str(tmp_path / "base"), keep=True), case("pruned", "{dense}/model", ("dense",), pruned)]


def run(suite, path):
    out = io.StringIO()
    document = run_cases("tiny", suite, suite[1:], path, Console(file=out, width=200))
    return document, [line.split(":")[0] for line in out.getvalue().splitlines() if line.endswith(": running")]


def test_runs_what_is_missing_and_keeps_what_is_there(suite, tmp_path):
    path = tmp_path / "results.json"
    document, ran = run(suite, path)
    assert ran == ["dense", "pruned"]
    record = document["cases"]["pruned"]
    assert record["key"] == suite[1].key and record["kind"] == "pruned" and record["group"] == "group"
    assert 0 <= record["quality"]["torch"] <= 1
    assert record["parameters"]["nonzero"] < record["parameters"]["total"]
    assert json.loads(path.read_text()) == document
    assert suite[0].folder("tiny").is_dir() and not suite[1].folder("tiny").exists()
    assert run(suite, path) == (document, [])
    # Another recipe of the same name runs again, on the dense model that is still there.
    changed = Case("pruned", "group", {**suite[1].recipe, "description": "again"}, ("dense",))
    _, ran = run([suite[0], changed], path)
    assert ran == ["pruned"]


def test_missing_data_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COMPRESSFT_DATA", "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder; set COMPRESSFT_DATA"):
        engine.data_folder()
    monkeypatch.setattr("sys.argv", ["benchmarks", "methods", "sst2-full"])
    assert benchmark() == 2
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder")


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", ""])
def test_counts_start_at_one(text):
    with pytest.raises(ArgumentTypeError, match="no whole number from 1 on"):
        positive(text)
    assert positive("12") == 12


def test_every_case_is_a_recipe_of_its_own():
    everything = cases()
    assert len({case.name for case in everything}) == len({case.key for case in everything}) == len(everything)
    names = {case.name for case in everything}
    for case in everything:
        assert parse_recipe(dict(case.recipe)).name == case.name
        assert set(case.after) <= names


# What `python -m benchmarks methods` runs, chooses and says.


def ran(score, validation, trained=1000, delta=1000):
    """A finished run's record."""
    return {
        "quality": {"metric": "accuracy", "torch": score},
        "validation": [{"accuracy": validation}],
        "parameters": {"base": 20000, "trainable": trained},
        "size_bytes": {"delta": delta},
    }


def graded(best, tasks=("sst2", "banking77")):
    """A document in which the grid of every method has run and the rate at place `best` of the first is the best."""
    document = {"cases": {}}
    # A fusion stands on adapters.
    for name in sorted(methods.SETTINGS, key=lambda name: name == "fusion"):
        for task in tasks:
            good = methods.SETTINGS[name].rates[best] if best is not None else None
            while missing := [one for one in methods.grid(document, task, name) if not methods.record(document, one)]:
                for one in missing:
                    score = 0.9 if one.facts["rate"] == good else 0.8
                    document["cases"][one.name] = {"key": one.key, **ran(0.5, score)}
    return document


def test_every_run_of_a_method_is_a_recipe_of_its_own():
    document = graded(1)
    wanted = [one for task in methods.TASKS for name in methods.SETTINGS for one in methods.grid(document, task, name)]
    wanted += [
        one for task in methods.TASKS for name in methods.SETTINGS for one in methods.seeded(document, task, name)
    ]
    by_name = {one.name: one for one in wanted}
    assert len({one.key for one in by_name.values()}) == len(by_name) == 240
    for one in wanted:
        assert one == by_name[one.name]
        recipe = parse_recipe(dict(one.recipe))
        assert recipe.data.limit is None
        assert set(one.after) <= set(by_name)
    assert {name for task, name in ((one.facts["task"], one.facts["method"]) for one in wanted)} == set(
        methods.SETTINGS
    )


@pytest.mark.parametrize("best", [0, 1, 2])
def test_rates_are_chosen_on_validation_and_kept_for_the_other_seeds(best):
    document = graded(best)
    for name, setting in methods.SETTINGS.items():
        assert methods.chosen(document, "sst2", name) == setting.rates[best]
        runs = methods.seeded(document, "sst2", name)
        assert [one.facts["seed"] for one in runs] == [0, 1, 2]
        assert {one.facts["rate"] for one in runs} == {setting.rates[best]}
        assert runs[0].name in document["cases"]
        stages = [parse_recipe(dict(one.recipe)).stages[0] for one in runs]
        assert [stage.train.seed for stage in stages] == [0, 1, 2]
        method = stages[0].method
        asked = method.learning_rate if setting.head_rate else stages[0].train.learning_rate
        assert asked == setting.rates[best]
        assert stages[0].train.learning_rate == (setting.head_rate or setting.rates[best])


def test_test_scores_choose_nothing():
    document = graded(1)
    for number, one in enumerate(methods.grid(document, "sst2", "lora")):
        document["cases"][one.name]["quality"]["torch"] = 0.9 - 0.1 * number
    assert methods.chosen(document, "sst2", "lora") == methods.SETTINGS["lora"].rates[1]


def test_of_equal_rates_the_lowest_is_chosen():
    document = graded(None)
    assert methods.SETTINGS["lora"].rates == (3e-4, 1e-3, 3e-3)
    assert methods.chosen(document, "sst2", "lora") == 3e-5


@pytest.mark.parametrize("best, tried", [(0, (1e-4, 3e-4, 1e-3, 3e-3)), (2, (3e-4, 1e-3, 3e-3, 1e-2))])
def test_a_grid_grows_beyond_an_end_that_is_best(best, tried):
    document = graded(best)
    assert tuple(one.facts["rate"] for one in methods.grid(document, "sst2", "lora")) == tried


def test_a_grid_grows_by_two_rates_at_most():
    document = {"cases": {}}
    for number in range(5):
        assert methods.chosen(document, "sst2", "lora") is None
        one = methods.grid(document, "sst2", "lora")[number]
        document["cases"][one.name] = {"key": one.key, **ran(0.5, one.facts["rate"])}
    assert methods.chosen(document, "sst2", "lora") == 3e-2


def test_every_grid_stands_on_a_ladder():
    for setting in methods.SETTINGS.values():
        below, above = methods_choice.neighbours(setting.rates)
        assert below < min(setting.rates) and max(setting.rates) < above
    assert methods_choice.neighbours((1e-3, 3e-3)) == (3e-4, 1e-2)
    assert methods_choice.neighbours((5e-5, 1e-4, 2e-4)) == (2e-5, 5e-4)
    with pytest.raises(ValueError, match="on no ladder"):
        methods_choice.neighbours((4e-4,))


def test_nothing_is_chosen_before_the_grid_has_run():
    document = graded(1)
    last = methods.grid(document, "sst2", "lora")[-1]
    del document["cases"][last.name]
    assert methods.chosen(document, "sst2", "lora") is None
    with pytest.raises(UserError, match="sst2-lora: its learning rate is not chosen yet"):
        methods.seeded(document, "sst2", "lora")
    for one in methods.grid(document, "rte", "adapter-pfeiffer"):
        del document["cases"][one.name]
    assert methods.chosen(document, "banking77", "fusion") is None


def test_small_tasks_take_the_choice_of_another_and_run_once():
    document = graded(2)
    (one,) = methods.seeded(document, "wnut17", "lora")
    assert one.facts["rate"] == methods.SETTINGS["lora"].rates[2]
    assert parse_recipe(dict(one.recipe)).task.type == "token-classification"
    assert [run.facts["task"] for run in methods.grid(document, "wnut17", "lora")] == ["banking77"] * 4


def test_a_choice_of_another_with_which_nothing_is_learned_gives_way(pretended):
    """Twice at most; seeds and tables follow."""
    path, order, diverging = pretended
    diverging.add("wnut17-lora-0.001")
    found, table = study("wnut17", "lora", path)
    assert order[-3:] == ["wnut17-lora-0.001", "wnut17-lora-0.0003", "wnut17-lora-0.0001"]
    assert (found["learning_rate"], found["learned_nothing"]) == (1e-4, [1e-3, 3e-4])
    assert "0.0001, for 0.001, banking77's |" in table
    (one,) = methods.seeded(methods.results(path), "wnut17", "lora")
    assert one.name == "wnut17-lora-0.0001"


def test_fusion_reads_the_adapters_at_their_chosen_rates():
    document = graded(0)
    one = methods.seeded(document, "sst2", "fusion")[0]
    sources = [methods.first_case(document, task, "adapter-pfeiffer") for task in ("sst2", "banking77", "rte")]
    assert one.after == tuple(source.name for source in sources)
    assert parse_recipe(dict(one.recipe)).stages[0].method.adapters == tuple(f"{{{s.name}}}/delta" for s in sources)
    assert one.key != methods.seeded(graded(1), "sst2", "fusion")[0].key


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """(path, names of what was run, names of what diverges): runs are made up; the middle rate is the best."""
    path, order, diverging = tmp_path / "results.json", [], set()

    def pretend(suite, cases, wanted, path, console):
        for one in wanted:
            if one.name in methods.results(path)["cases"]:
                continue
            order.append(one.name)
            if one.name in diverging:
                raise UserError("the loss became nan")
            good = one.facts["rate"] == methods.SETTINGS[one.facts["method"]].rates[1]
            run = {"key": one.key, **ran(0.5, float(good))}
            methods.update(path, lambda document: document["cases"].update({one.name: run}))  # noqa: B023

    monkeypatch.setattr(methods, "run_cases", pretend)
    return path, order, diverging


def study(task, method, path):
    methods.study(task, method, False, path, Console(file=io.StringIO()))
    methods.write(path)
    return methods.results(path)["chosen"][f"{task}-{method}"], path.with_suffix(".md").read_text()


def test_study_runs_the_grid_then_the_seeds_and_writes_the_choice(pretended):
    path, order, _ = pretended
    found, _ = study("rte", "lora", path)
    assert order == ["sst2-lora-0.0003", "sst2-lora-0.001", "sst2-lora-0.003", "rte-lora-0.001"]
    assert found == {"learning_rate": 1e-3, "chosen_on": "sst2", "validation": {"0.0003": 0, "0.001": 1, "0.003": 0}}
    order.clear()
    _, table = study("sst2", "lora", path)
    assert order == ["sst2-lora-0.001-seed1", "sst2-lora-0.001-seed2"]
    assert "| lora | 50.00 ± 0.00 % | - | 50.00 % | - |" in table
    assert "| lora | 0.001 (0.0003: 0.0, 0.001: 100.0, 0.003: 0.0) | - | 0.001, sst2's | - |" in table


def test_a_rate_that_diverges_is_not_chosen(pretended):
    path, order, diverging = pretended
    diverging |= {"sst2-lora-0.001", "sst2-lora-0.003"}
    found, table = study("sst2", "lora", path)
    assert found["learning_rate"] == 3e-5
    assert order[3:] == [f"sst2-lora-{run}" for run in ("0.0001", "3e-05", "3e-05-seed1", "3e-05-seed2")]
    assert "3e-05 (3e-05: 0.0, 0.0001: 0.0, 0.0003: 0.0, 0.001: diverged, 0.003: diverged)" in table
    diverging.add("banking77-lora-0.001-seed1")
    _, table = study("banking77", "lora", path)
    # A mean over the other seeds would flatter it.
    assert "| lora | 50.00 ± 0.00 % | - | - | - |" in table
    diverging |= {f"banking77-dora-{rate:g}" for rate in methods.SETTINGS["dora"].rates}
    found, table = study("banking77", "dora", path)
    assert found["learning_rate"] is None and "| none (0.0003: diverged" in table


def test_runs_that_were_asked_otherwise_do_not_count():
    document = graded(1)
    one = methods.grid(document, "sst2", "lora")[0]
    document["cases"][one.name]["key"] = "another"
    assert methods.record(document, one) is None
    assert methods.chosen(document, "sst2", "lora") is None


JUDGED = ("sst2", "banking77")


def several(score, **fields):
    return [ran(score + 0.01 * seed, 0.0, **fields) for seed in (-1, 0, 1)]


def said(**changes):
    """The three claims' lines for a full model at 90 % and everything else as the papers have it, but `changes`."""
    good = {"adapter-houlsby": {}, "adapter-pfeiffer": {}, "adapter-parallel": {}, "prefix": {}}
    # 8,000 masked weights, and for one of them a head of 100 values.
    good |= {"mask": {"trained": 8000}, "supermask": {"trained": 8100, "delta": 1400}}
    runs = {(task, "full"): several(0.9, trained=20000, delta=80000) for task in JUDGED}
    for name, fields in good.items():
        fields = {"score": 0.9, "trained": 900, **fields, **changes.get(name.replace("-", "_"), {})}
        runs |= {(task, name): several(**fields) for task in JUDGED}
    return claims(runs, (*JUDGED, "rte"), dict.fromkeys(("mask", "supermask"), 8000))


def test_variants_have_the_rate_of_their_placement_and_a_table(pretended):
    path, *_ = pretended
    assert methods.varied(methods.results(path), "adapter-houlsby-24") == []
    study("sst2", "adapter-houlsby", path)
    runs = methods.varied(methods.results(path), "adapter-houlsby-24")
    assert [one.name for one in runs] == [f"sst2-adapter-houlsby-24-0.001{seed}" for seed in ("", "-seed1", "-seed2")]
    stage = parse_recipe(dict(runs[2].recipe)).stages[0]
    assert (stage.method.model_dump()["size"], stage.train.learning_rate) == (24, 1e-3)
    assert "Width and place" not in path.with_suffix(".md").read_text()
    update = {one.name: {"key": one.key, **ran(0.25, 0.1, trained=500)} for one in runs}
    methods.update(path, lambda document: document["cases"].update(update))
    methods.write(path)
    table = path.with_suffix(".md").read_text().partition("## Width and place of an adapter (sst2)")[2]
    assert table.index("| adapter-houlsby-24 | 2.50 % | 25.00 ± 0.00 % |") < table.index(
        "| adapter-houlsby | 5.00 % | 50.00"
    )
    assert "adapter-pfeiffer" not in table.partition("##")[0]


def test_claims_that_hold_are_met():
    lines = said()
    assert len(lines) == 3 and all("**met**" in line for line in lines)
    assert "sst2 +0.0 ± 0.8, banking77 +0.0 ± 0.8 points with 4.5 %" in lines[0]
    assert lines[1].count("1.00 bits") == 2
    assert "100.0 %" in lines[2]


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (0, {"adapter_pfeiffer": {"score": 0.889}}),
        (0, {"adapter_parallel": {"trained": 1000}}),
        (1, {"mask": {"score": 0.879}, "supermask": {"score": 0.879}}),
        (1, {"mask": {"delta": 1100}, "supermask": {"delta": 1500}}),
        (2, {"prefix": {"score": 0.85}}),
    ],
)
def test_claims_that_do_not_hold_are_not_met(number, changes):
    lines = said(**changes)
    assert ["**not met**" in line for line in lines] == [place == number for place in range(3)]


def test_one_kind_of_mask_is_enough():
    assert "**met**" in said(mask={"score": 0.7})[1]


def test_claims_wait_for_several_seeds():
    runs = {("rte", name): [ran(0.5, 0.0)] for name in ("full", "mask", "adapter-houlsby")}
    assert all(line.endswith("not measured yet.") for line in claims(runs, ("rte",), {}))
    assert all(line.endswith("not measured yet.") for line in claims({}, JUDGED, {}))


def test_masked_weights_are_counted():
    # Attention's four projections of six layers; all six of the upper five layers, and the pooler.
    assert methods.masked_weights("supermask") == 6 * 4 * 384**2
    assert methods.masked_weights("mask") == 5 * (4 * 384**2 + 2 * 384 * 1536) + 384**2
