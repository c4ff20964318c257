"""Recipes: loading, `extends`, overrides, refusals that say what to do, and the hash that identifies a run."""

from __future__ import annotations

import ast
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from compressft.data.source import DataConfig
from compressft.errors import UserError
from compressft.methods import METHODS
from compressft.objectives import OBJECTIVES
from compressft.passes import PASSES
from compressft.recipe.document import shipped_recipes
from compressft.recipe.parts import ExportConfig, TrainConfig
from compressft.recipe.recipe import Recipe, load_recipe, parse_recipe, smoke

BASE: dict[str, Any] = {
    "name": "base",
    "model": "minilm",
    "data": {"train": "rows.jsonl"},
    "stages": [
        {"name": "teacher", "train": {"epochs": 2, "batch_size": 16}},
        {
            "name": "student",
            "method": "full",
            "objectives": [{"type": "distill", "teacher": "teacher"}],
            "passes": [{"type": "structured", "heads": 0.5}, "int8"],
            "train": {"epochs": 4},
        },
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(name: str, document: Any) -> Path:
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document), encoding="utf-8")
        return path

    return write


@pytest.fixture
def base(write):
    return write("base.yaml", BASE)


def refusal(source: Any, *overrides: str) -> str:
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError) as caught:
        load_recipe(source, overrides)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# Loading.


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_by_name_and_by_path(name):
    recipe = load_recipe(name)
    assert recipe == load_recipe(shipped_recipes()[name])
    assert recipe.name == name
    assert recipe.description
    assert recipe.export.enabled == all(transform.exports for stage in recipe.stages for transform in stage.transforms)


def test_names_and_mappings_mean_the_same(base, write):
    written = json.loads(json.dumps(BASE))
    written["stages"][0]["method"] = {"type": "full"}
    written["stages"][1]["passes"][1] = {"type": "int8"}
    assert load_recipe(base) == load_recipe(write("written.yaml", written))


def test_byte_order_mark_and_non_ascii_are_read(write):
    recipe = load_recipe(
        write("r.yaml", "\ufeff" + yaml.safe_dump({**BASE, "description": "Größe"}, allow_unicode=True))
    )
    assert recipe.description == "Größe"


def test_unknown_recipe_names_the_shipped_ones_and_the_nearest():
    message = refusal("banking77-egde")
    assert "'banking77-egde'" in message
    assert "did you mean 'banking77-edge'?" in message
    assert all(name in message for name in shipped_recipes())


@pytest.mark.parametrize(
    ("text", "said"),
    [("- 1\n", "got list"), ("", "got NoneType"), ("a: [1\n", "is not YAML"), ("a: b: c\n", "is not YAML")],
)
def test_file_that_is_no_mapping_is_refused(write, text, said):
    path = write("broken.yaml", text)
    message = refusal(path)
    assert str(path) in message
    assert said in message


def test_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xe9t\xe9\n")
    assert "is not UTF-8 (byte 6)" in refusal(path)


# extends.


def test_extends_merges_mappings_and_stages_by_name(base, write):
    child = {
        "extends": "base.yaml",
        "name": "child",
        "data": {"max_length": 32},
        "stages": [{"name": "student", "train": {"batch_size": 4}}, {"name": "third", "method": "probe"}],
    }
    parent, recipe = load_recipe(base), load_recipe(write("child.yaml", child))
    assert [stage.name for stage in recipe.stages] == ["teacher", "student", "third"]
    assert recipe.stages[0] == parent.stages[0]
    assert recipe.stages[1].passes == parent.stages[1].passes
    assert (recipe.stages[1].train.epochs, recipe.stages[1].train.batch_size) == (4, 4)
    assert recipe.stages[2].method.type == "probe"
    assert (recipe.data.train, recipe.data.max_length) == ("rows.jsonl", 32)
    assert (recipe.name, recipe.model) == ("child", "minilm")


def test_a_method_of_another_type_replaces_the_base_s(write):
    write("parent.yaml", {**BASE, "stages": [{"name": "one", "method": {"type": "adapter", "size": 8}}]})
    child = write("child.yaml", {"extends": "parent.yaml", "stages": [{"name": "one", "method": {"type": "prefix"}}]})
    assert load_recipe(child).stages[0].method.type == "prefix"
    same = write("same.yaml", {"extends": "parent.yaml", "stages": [{"name": "one", "method": {"scale": 2.0}}]})
    assert load_recipe(same).stages[0].method.size == 8


def test_extends_replaces_lists_that_are_not_stages(base, write):
    child = {"extends": "base.yaml", "stages": [{"name": "student", "passes": ["int8"]}]}
    assert [p.type for p in load_recipe(write("child.yaml", child)).stages[1].passes] == ["int8"]


def test_extends_follows_shipped_names_and_chains(write):
    write("one.yaml", {"extends": "banking77-edge", "name": "one", "data": {"per_class": 5}})
    two = load_recipe(write("two.yaml", {"extends": "one.yaml", "name": "two"}))
    assert (two.name, two.data.per_class, two.data.sample) == ("two", 5, "banking77")
    assert two.stages == load_recipe("banking77-edge").stages


@pytest.mark.parametrize("chain", [("a.yaml",), ("a.yaml", "b.yaml"), ("a.yaml", "b.yaml", "c.yaml")])
def test_extends_in_a_circle_is_refused(write, chain):
    paths = [write(name, {"extends": after}) for name, after in zip(chain, chain[1:] + chain[:1], strict=True)]
    message = refusal(paths[0])
    assert "`extends` leads back to this file" in message
    assert str(paths[0]) in message


def test_extends_of_nothing_is_refused(write):
    assert "'nowhere.yaml' is neither a file nor a shipped recipe" in refusal(
        write("a.yaml", {"extends": "nowhere.yaml"})
    )


# --set.


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("model=other", lambda r: r.model == "other"),
        ("data.max_length=17", lambda r: r.data.max_length == 17),
        ("data.columns.text=question", lambda r: r.data.columns == {"text": "question"}),
        ("data.columns={text: a, label: b}", lambda r: r.data.columns == {"text": "a", "label": "b"}),
        ("stages.student.train.epochs=0.5", lambda r: [s.train.epochs for s in r.stages] == [2, 0.5]),
        ("stages.1.train.epochs=0.5", lambda r: [s.train.epochs for s in r.stages] == [2, 0.5]),
        ("stages.-1.train.epochs=0.5", lambda r: [s.train.epochs for s in r.stages] == [2, 0.5]),
        ("stages.student.train.learning_rate=1e-4", lambda r: r.stages[1].train.learning_rate == 1e-4),
        (
            "stages.student.passes.structured.ffn=0.25",
            lambda r: (r.stages[1].passes[0].heads, r.stages[1].passes[0].ffn) == (0.5, 0.25),
        ),
        ("stages.student.passes.0.ffn=0.25", lambda r: r.stages[1].passes[0].ffn == 0.25),
        # A pass and a method that are given by name alone become mappings.
        ("stages.student.passes.int8.start=0.25", lambda r: r.stages[1].passes[1].start == 0.25),
        ("stages.student.method.freeze_embeddings=true", lambda r: r.stages[1].method.freeze_embeddings),
        ("stages.teacher.method.freeze_embeddings=true", None),
        (
            "stages.student.objectives.distill.layer_map=[[1, 1], [2, 2]]",
            lambda r: r.stages[1].objectives[0].layer_map == ((1, 1), (2, 2)),
        ),
        ("stages.student.passes=[]", lambda r: r.stages[1].passes == ()),
        ("stages.student.passes.1={type: int8, ranges: dynamic}", lambda r: r.stages[1].passes[1].ranges == "dynamic"),
        ("export.label_agreement=0.5", lambda r: r.export.label_agreement == 0.5),
        ("stages.student.train.save=no", lambda r: r.stages[1].train.save == "no"),
    ],
)
def test_override(base, override, value):
    if value is None:
        # Fields of a method that the file does not name need its type.
        assert "method None is not known" in refusal(base, override)
        return
    assert value(load_recipe(base, [override]))
    assert not value(load_recipe(base))


def test_overrides_apply_in_order(base):
    overrides = ["data.max_length=20", "data={train: other.jsonl}", "data.seed=3", "data.seed=4"]
    data = load_recipe(base, overrides).data
    assert (data.train, data.max_length, data.seed) == ("other.jsonl", 128, 4)


@pytest.mark.parametrize("source", ["sample", "dataset", "train"])
def test_a_new_source_of_rows_replaces_the_old_one_and_its_files(write, source):
    parent = {**BASE, "data": {"train": "a.jsonl", "validation": "v.jsonl", "test": "t.jsonl", "seed": 5}}
    path = write("base.yaml", parent)
    child = write("child.yaml", {"extends": "base.yaml", "data": {source: "b"}})
    for data in (load_recipe(path, [f"data.{source}=b"]).data, load_recipe(child).data):
        assert data.model_dump(exclude_unset=True) == {source: "b", "seed": 5}
    assert load_recipe(path, ["data.validation=w.jsonl"]).data.test == "t.jsonl"


def test_override_of_a_source_in_data_that_is_no_mapping_is_refused(write):
    assert "data: Input should be" in refusal(write("r.yaml", {**BASE, "data": ["x", "y"]}), "data.0=z")
    assert "no item 'train'" in refusal(write("r.yaml", {**BASE, "data": ["x", "y"]}), "data.train=z")


def test_override_reaches_one_stage_where_yaml_aliases_share_a_value(write):
    text = (
        "name: a\nmodel: minilm\ndata: {train: rows.jsonl}\nstages:\n"
        "- {name: one, train: &t {epochs: 1}}\n- {name: two, train: *t}\n"
    )
    recipe = load_recipe(write("alias.yaml", text), ["stages.two.train.epochs=5"])
    assert [stage.train.epochs for stage in recipe.stages] == [1, 5]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.max_length", "wants PATH=VALUE"),
        ("=3", "wants PATH=VALUE"),
        ("model=[a", "is not YAML"),
        ("stages.studnet.train.epochs=1", "no item 'studnet'; items: teacher, student (did you mean 'student'?)"),
        ("stages.7.train.epochs=1", "no item '7'"),
        ("stages.student.passes.int9.start=1", "(did you mean 'int8'?)"),
        ("model.size=1", "model is 'minilm', which has no fields"),
        ("data.max_length.x=1", "which has no fields"),
    ],
)
def test_override_that_leads_nowhere_is_refused(base, override, said):
    message = refusal(base, override)
    if "max_length.x" not in override:
        assert message.startswith(f"--set {override!r}: ")
        assert said in message


# Refusals: path, value, what is allowed, the nearest.


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("modle=x", ["modle: unknown field", "allowed:", "task", "(did you mean 'model'?)"]),
        ("data.colums={}", ["data.colums: unknown field", "validation_fraction", "(did you mean 'columns'?)"]),
        (
            "stages.1.train.epoch=3",
            ["stages.1.train.epoch: unknown field", "learning_rate", "(did you mean 'epochs'?)"],
        ),
        (
            "stages.1.passes.0.haeds=0.1",
            ["stages.1.passes", "structured.haeds: unknown field", "(did you mean 'heads'?)"],
        ),
        ("stages.1.passes.0.heads=1.0", ["stages.1.passes", "structured.heads", "less than 1", "(got 1.0)"]),
        (
            "stages.1.passes.0.schedule=cubci",
            ["structured.schedule", "'cubic'", "'linear'", "(got 'cubci')", "(did you mean 'cubic'?)"],
        ),
        (
            "stages.1.passes.1=intt8",
            ["stages.1.passes", "'intt8' is not known", "structured", "(did you mean 'int8'?)"],
        ),
        ("stages.1.method=prob", ["stages.1.method", "'prob' is not known", *METHODS, "(did you mean 'probe'?)"]),
        ("stages.1.objectives=[destill]", ["stages.1.objectives", *OBJECTIVES, "(did you mean 'distill'?)"]),
        ("stages.1.objectives.0={type: distill}", ["stages.1.objectives", "distill.teacher: is required"]),
        ("stages.1.passes=int8", ["stages.1.passes", "wants a list", "'int8'"]),
        ("stages.1.method=5", ["stages.1.method", "wants a name or a mapping", "5"]),
        ("stages.1.method={type: adapter, size: 8, reduction_factor: 4}", ["stages.1.method", "both set", "give one"]),
        ("stages.1.train.learning_rate=0", ["stages.1.train.learning_rate", "greater than 0", "(got 0)"]),
        ("stages.1.train.max_grad_norm=.inf", ["stages.1.train.max_grad_norm", "finite", "(got inf)"]),
        ("stages.1.train.save=0", ["stages.1.train.save", "'epoch'", "got 0"]),
        ("stages.1.train.save=true", ["stages.1.train.save", "got True"]),
        ("stages.1.train=null", ["stages.1.train", "(got None)"]),
        ("stages.1.name=a b", ["stages.1.name", "'a b'"]),
        ("task=sequence-classifaction", ["task", "regression", "(did you mean 'sequence-classification'?)"]),
        ("data.max_length=abc", ["data.max_length", "integer", "'abc'"]),
        ("data.validation_fraction=1", ["data.validation_fraction", "less than 1", "(got 1)"]),
        ("data.per_class=1", ["data.per_class", "(got 1)"]),
        ("data={sample: a, dataset: b}", ["data", "exactly one of sample, dataset and train", "['sample', 'dataset']"]),
        ("data={}", ["data", "exactly one of sample, dataset and train"]),
        ("stages=[]", ["stages", "at least 1"]),
        ("stages.1.train.seed=-1", ["stages.1.train.seed", "greater than or equal to 0", "(got -1)"]),
        ("stages.1.train.seed=4294967296", ["stages.1.train.seed", "at most 4,294,967,295"]),
        ("data.train=[]", ["data.train", "names nothing", "(got ())"]),
        ("data.train=''", ["data.train", "names nothing", "(got '')"]),
        ("data.train=['']", ["data.train", "names nothing"]),
        ("data.unlabelled=[]", ["data.unlabelled", "names nothing"]),
        ("data={sample: ''}", ["data.sample", "names nothing"]),
        ("data={dataset: ''}", ["data.dataset", "names nothing"]),
        ("export.latency_shapes=[[1, 0]]", ["export.latency_shapes.0.1", "greater than 0", "(got 0)"]),
        ("export.latency_shapes=[[1]]", ["export.latency_shapes.0.1", "is required"]),
        ("export.label_agreement=1.5", ["export.label_agreement", "(got 1.5)"]),
    ],
)
def test_wrong_field_or_value_is_refused(base, override, said):
    message = refusal(base, override)
    assert message.startswith(f"{base}: ")
    for part in said:
        assert part in message


def test_missing_field_is_refused(write):
    message = refusal(write("r.yaml", {key: value for key, value in BASE.items() if key != "model"}))
    assert message.endswith("model: is required")


def test_further_problems_are_counted(base):
    # The list of stages lacks the wrong one, which is no second mistake.
    assert "more)" not in refusal(base, "stages.1.train.epochs=0")
    assert refusal(base, "stages.1.train.epochs=0", "data.seed=x").endswith("(and 1 more)")
    assert refusal(base, "modle=x", "data.sead=1", "export.batch=0").endswith("(and 2 more)")


# Contradictions.


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"method": "probe", "passes": ["int8"]}, "set method.cache to false"),
        ({"method": "probe", "passes": [{"type": "structured", "ffn": 0.5}]}, "set method.cache to false"),
        ({"passes": ["structured"]}, "heads and ffn are both 0"),
        (
            {"passes": [{"type": "structured", "ffn": 0.5, "start": 0.5, "end": 0.5}]},
            "structured.end: 0.5 is not after",
        ),
        ({"passes": [{"type": "int8", "start": 0.9}]}, "int8.freeze: 0.8 is not after int8.start 0.9"),
        ({"passes": ["int8", "int8"]}, "['int8'] given twice"),
        ({"objectives": [{"type": "distill", "teacher": "self"}] * 2}, "['distill'] given twice"),
        ({"name": "self"}, "'self' is taken"),
    ],
)
def test_contradictory_stage_is_refused(write, stage, said):
    path = write("r.yaml", {**BASE, "stages": [{"name": "only", **stage}]})
    assert said in refusal(path)


def test_probe_without_cache_may_be_quantised(write):
    stage = {"name": "only", "method": {"type": "probe", "cache": False}, "passes": ["int8"]}
    assert load_recipe(write("r.yaml", {**BASE, "stages": [stage]})).stages[0].method.type == "probe"


@pytest.mark.parametrize("teacher", ["student", "third"])
def test_own_or_later_stage_as_teacher_is_refused(write, teacher):
    stages = [*BASE["stages"], {"name": "third"}]
    path = write("r.yaml", {**BASE, "stages": stages})
    message = refusal(path, f"stages.student.objectives.0.teacher={teacher}")
    assert f"takes stage {teacher!r} as its teacher" in message
    assert "name an earlier stage" in message


def test_two_stages_of_one_name_are_refused(base):
    assert "names must differ" in refusal(base, "stages.1.name=teacher")


# Round trip and hash.


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all leaves of plain data; empty and scalar lists are leaves."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in leaves(item, (*path, index))]
    return [path]


def full() -> Recipe:
    """A recipe in which every kind of Transform occurs, each pass that nothing else asks for in a stage of its own."""
    fields: dict[str, dict[str, Any]] = {
        "structured": {"heads": 0.5},
        "ziplm": {"target": {"speedup": 2.0}},
        "depth": {"keep": 2},
        "magnitude": {"sparsity": 0.5},
        "movement": {"sparsity": 0.5},
        "block": {"sparsity": 0.5},
        "wanda": {"sparsity": 0.5},
        "sparsegpt": {"sparsity": 0.5},
    }
    methods = {"nf4": "adapter"}
    method_fields: dict[str, dict[str, Any]] = {"layers": {"top": 1}, "fusion": {"adapters": ["a/delta"]}}
    stages = [
        {"name": "teacher"},
        *(
            {"name": f"method-{name}", "method": {"type": name, **method_fields.get(name, {})}}
            for name in METHODS
            if name != "full"
        ),
        {
            "name": "student",
            "objectives": [{"type": "distill", "teacher": "teacher"}],
            "passes": [{"type": "structured", "heads": 0.5}, "int8"],
        },
        *(
            {"name": name, "method": methods.get(name, "full"), "passes": [{"type": name, **fields.get(name, {})}]}
            for name in PASSES
            if name not in ("structured", "int8")
        ),
        # Fields that mean something next to others only.
        {
            "name": "attentive",
            "objectives": [
                {"type": "distill", "teacher": "teacher", "hidden": 1.0, "attention": 1.0, "relations": 1.0}
            ],
        },
        {"name": "sparse", "method": {"type": "task_vector", "encoding": "magnitude", "density": 0.1}},
        {"name": "low", "method": {"type": "task_vector", "encoding": "low_rank", "rank": 2}},
        {"name": "heads", "method": {"type": "head_gates", "decide": "importance", "heads": 0.3}},
        {"name": "stacked", "method": {"type": "adapter", "placement": "pfeiffer"}},
        {"name": "wide-probe", "method": {"type": "probe", "head": "mlp"}},
        {"name": "ladder", "method": {"type": "side", "network": "ladder"}},
        {"name": "soft", "passes": [{"type": "movement", "variant": "soft"}]},
        {"name": "pattern", "passes": [{"type": "wanda", "pattern": "1:4"}]},
        {"name": "pattern2", "passes": [{"type": "sparsegpt", "pattern": "1:4"}]},
        {"name": "learned", "passes": [{"type": "structured", "decide": "learned", "sparsity": 0.5}]},
        {"name": "target", "passes": [{"type": "structured", "target": {"speedup": 3.0}}]},
    ]
    recipe = parse_recipe({**BASE, "stages": stages})
    used = {type(t) for stage in recipe.stages for t in stage.transforms}
    assert used == {*METHODS.values(), *OBJECTIVES.values(), *PASSES.values()}
    return recipe


ODD = {"name": "1e3", "description": "no: [yes] # ünder ' \" \\ - 2020-01-01\nsecond line", "model": "null"}


@pytest.mark.parametrize("change", [{}, ODD, {"smoke": True}])
def test_written_recipe_reads_back_with_the_same_hash(write, change):
    recipe = parse_recipe({**json.loads(full().model_dump_json()), **change})
    again = load_recipe(write("recipe.yaml", recipe.to_yaml()))
    assert again == recipe
    assert again.hash == recipe.hash
    assert again.to_yaml() == recipe.to_yaml()
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", recipe.hash)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_round_trip(write, name):
    recipe = load_recipe(name)
    assert load_recipe(write("recipe.yaml", recipe.to_yaml())).hash == recipe.hash


def others(model: type[BaseModel], name: str, value: Any) -> list[Any]:
    """Values to try for a field: the other literals of its annotation, and some of every kind."""
    literals = re.findall(r"Literal\[(.*?)\]", str(model.model_fields[name].annotation))
    words = [ast.literal_eval(word) for text in literals for word in text.split(", ")]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        words += [value + 1, value * 0.5 + 0.1, value * 0.5, value * 0.9, 1]
    texts = ["q", "adapter", "2:4", "1e3", f"{value}x"]
    lists: list[Any] = [["q"], ["heads"], [[1, 8]], [[1, 1]], {"text": "t"}, {"speedup": 2.0}, {"speedup": 3.0}]
    lists += [{"copies": 2.0}, {"peft_type": "IA3"}]
    return [other for other in [*words, *texts, *lists, 1, 2, 0.5, True, False] if other != value]


def settings(recipe: Recipe) -> list[tuple[tuple[Any, ...], BaseModel]]:
    """Every part of a recipe that has fields, with the path to it."""
    found: list[tuple[tuple[Any, ...], BaseModel]] = [
        ((), recipe),
        (("data",), recipe.data),
        (("export",), recipe.export),
    ]
    for i, stage in enumerate(recipe.stages):
        at = ("stages", i)
        found += [(at, stage), ((*at, "train"), stage.train), ((*at, "method"), stage.method)]
        for kind in ("objectives", "passes"):
            found += [((*at, kind, k), one) for k, one in enumerate(getattr(stage, kind))]
    return found


# Fields that cannot change alone in this recipe: other fields of the same Transform must change with them.
TOGETHER = {"variant", "rounding", "decide"}


def test_another_source_inherits_nothing_of_the_first_ones_rows(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("extends: banking77-edge\nname: own\ndata: {train: rows.jsonl}\n")
    for data in (load_recipe(path).data, load_recipe("banking77-edge", ["data.train=rows.jsonl"]).data):
        assert (data.train, data.sample, data.per_class, data.limit) == ("rows.jsonl", None, None, None)
        assert data.max_length == 64, "what is no sampling stays"
    assert load_recipe("banking77-edge", ["data.train=rows.jsonl", "data.per_class=5"]).data.per_class == 5


def test_hash_changes_with_every_field():
    """Each in a recipe of its own stage behind the first one, so that the number of stages does not multiply."""
    whole = full()
    plain = json.loads(whole.model_dump_json())
    recipes, hashes, changed, seen = {}, set(), 0, set()
    # Some data is for stages with a teacher alone.
    student = next(i for i, stage in enumerate(whole.stages) if stage.objectives)
    for path, part in settings(whole):
        number = path[1] if path[:1] == ("stages",) else student
        small = {**plain, "stages": [plain["stages"][k] for k in sorted({0, number})]}
        recipe = recipes.setdefault(number, parse_recipe(small))
        hashes.add(recipe.hash)
        path = ("stages", min(number, 1), *path[2:]) if path[:1] == ("stages",) else path
        for name in type(part).model_fields:
            if (type(part), name) in seen or name in ("type", "method", "objectives", "passes", "stages", "name"):
                continue
            for value in others(type(part), name, getattr(part, name)):
                document = json.loads(json.dumps(small))
                node = document
                for step in path:
                    node = node[step]
                node[name] = value
                with suppress(UserError):
                    again = parse_recipe(document)
                    if again != recipe:
                        hashes.add(again.hash)
                        changed += 1
                        seen.add((type(part), name))
                        break
    assert len(hashes) == changed + len(recipes)
    # Every field of every part was among them.
    parts = [DataConfig, TrainConfig, ExportConfig, *METHODS.values(), *OBJECTIVES.values(), *PASSES.values()]
    missed = {(part, name) for part in parts for name in part.model_fields if name != "type"} - seen
    assert {name for part, name in missed if part is not DataConfig} <= TOGETHER
    assert {name for part, name in missed if part is DataConfig} == {"sample", "dataset", "streaming"}
    for source in ("sample", "dataset"):
        assert parse_recipe({**plain, "data": {source: "x"}}).hash not in hashes
    stage = {"name": "one", "train": {"max_steps": 9}}
    files = {"train": "x", "validation": "y"}
    streams = [{**plain, "stages": [stage], "data": {**files, "streaming": on}} for on in (False, True)]
    assert len({parse_recipe(document).hash for document in streams}) == 2


def test_hash_changes_with_the_transforms_themselves(base):
    overrides = ["stages.1.passes=[int8]", "stages.1.objectives=[]", "stages.0.method=probe", "model=minilm"]
    hashes = [load_recipe(base, [override]).hash for override in overrides]
    assert len(set(hashes)) == len(overrides)
    # Writing a default out changes nothing.
    assert hashes[-1] == load_recipe(base).hash == load_recipe(base, ["data.max_length=128"]).hash


def test_recipes_are_frozen(base):
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(base).stages[0].train.epochs = 9


# smoke.


@pytest.mark.parametrize("name", shipped_recipes())
def test_smoke_is_the_same_recipe_on_little(name):
    recipe = load_recipe(name)
    small = smoke(recipe)
    assert small.smoke
    assert not recipe.smoke
    assert small.hash != recipe.hash
    assert small.data.limit <= 96
    assert small.data.max_length <= 32
    for stage, reduced in zip(recipe.stages, small.stages, strict=True):
        assert reduced.transforms == stage.transforms
        assert 0 < reduced.train.max_steps <= 4
        assert reduced.train.batch_size <= 8
        assert reduced.train.learning_rate == stage.train.learning_rate
    assert smoke(small) == small


def test_smoke_never_makes_a_small_recipe_larger(base):
    small = smoke(load_recipe(base, ["data.limit=10", "data.max_length=8", "stages.0.train.batch_size=2"]))
    assert (small.data.limit, small.data.max_length, small.stages[0].train.batch_size) == (10, 8, 2)
