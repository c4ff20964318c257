"""The shipped recipes: one for every method, each plans; adapters and the fusion that listens to them run in turn."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from compressft.methods import METHODS
from compressft.recipe.document import shipped_recipes
from compressft.recipe.recipe import Recipe, load_recipe, smoke
from compressft.run.flow import run
from compressft.run.plan.predict import plan
from tests.share import drawn
from tests.tiny_folder import save_tiny, write_jsonl

NAMES = sorted(shipped_recipes())
WORDS = ("apple", "river", "stone", "cloud", "lamp", "winter")
# Columns of the hub's data sets, by the beginning of a recipe's name.
COLUMNS = {
    "sst2": ("sentence", "label"),
    "rte": ("sentence1", "sentence2", "label"),
    "wikitext2": ("text",),
    "e2e": ("meaning_representation", "human_reference"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny encoder, a tiny decoder, and a file of rows for every data set that comes from the hub."""
    folder = tmp_path_factory.mktemp("shipped")
    save_tiny(folder / "bert", num_hidden_layers=3)
    save_tiny(folder / "gpt2", "gpt2", n_positions=512)
    for name, columns in COLUMNS.items():
        texts = [f"{WORDS[i % 6]} {WORDS[i % 5]} {WORDS[i % 4]}" for i in range(60)]
        rows = [{**dict.fromkeys(columns, text), "label": str(i % 2)} for i, text in enumerate(texts)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def there(place, monkeypatch):
    """Paths in recipes are relative to the folder they are run in."""
    monkeypatch.chdir(place)
    return place


def local(name: str, *more: str) -> Recipe:
    """A shipped recipe on a tiny model, and on rows of ours where it takes them from the hub."""
    model = "gpt2" if name.startswith("wikitext2") else "bert"
    files = [f"data.train={data}.jsonl" for data in COLUMNS if name.startswith(data)]
    return load_recipe(name, [f"model=./{model}", *files, *more])


def finished(name: str) -> dict[str, Any]:
    """Report of its smoke run, without the export, in the folder that `compressft run` takes."""
    recipe = smoke(local(name, "export.enabled=false"))
    return run(recipe, f"runs/{recipe.name}", console=Console(file=io.StringIO()))


def test_every_method_has_a_recipe():
    methods = {stage.method.type for name in NAMES for stage in load_recipe(name).stages}
    assert methods == set(METHODS)


def test_names_say_data_and_method():
    for name in NAMES:
        recipe = load_recipe(name)
        if len(recipe.stages) == 1:
            method = "lora" if recipe.stages[0].method.type == "peft" else recipe.stages[0].method.type
            assert name.split("-", 1)[1] == method.replace("_", "-"), name


def test_descriptions_are_one_line_of_their_own():
    found = [load_recipe(name).description for name in NAMES]
    assert len(set(found)) == len(found)
    assert all(0 < len(text) <= 120 and "\n" not in text and not text.endswith(".") for text in found)


def test_recipes_that_need_the_hub_say_so():
    for name in NAMES:
        recipe = load_recipe(name)
        assert ("hub" in recipe.description or "rte-adapter" in recipe.description) == bool(recipe.data.dataset), name


@pytest.mark.parametrize("name", drawn(6, [name for name in NAMES if name != "rte-fusion"]))
def test_every_recipe_plans(name, there):
    recipe = local(name, "data.limit=40")
    stages = plan(recipe).stages
    assert [stage["name"] for stage in stages] == [stage.name for stage in recipe.stages]
    assert all(stage["trainable"] > 0 and stage["steps"] > 0 for stage in stages)


@pytest.mark.full
def test_fusion_listens_to_the_adapters_that_its_description_names(there):
    sizes = [finished(name)["size_bytes"]["delta"] for name in ("sst2-adapter", "rte-adapter")]
    assert plan(local("rte-fusion")).stages[0]["trainable"] > 0
    # It ships the adapters too.
    assert finished("rte-fusion")["size_bytes"]["delta"] > max(sizes)


@pytest.mark.parametrize("name", drawn(1, ["banking77-probe", "banking77-mask", "wikitext2-lora"]))
def test_smoke(name, there):
    report = finished(name)
    assert report["parameters"]["trainable"] > 0
    assert 0 < report["size_bytes"]["delta"] < report["size_bytes"]["model"]
