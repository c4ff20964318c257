"""Run analyses: those of a recipe at the end of its run, and those that the command line asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressft.errors import UserError
from compressft.evaluation.analyses import ANALYSES
from compressft.evaluation.analyses.analysis import BASE, Analysis, Finding, Subjects
from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed
from compressft.model.saved.delta import base_tensors, load_delta
from compressft.model.saved.folders import MANIFEST, read_manifest
from compressft.recipe.document import override_all
from compressft.recipe.program import parse_member
from compressft.recipe.recipe import Recipe, load_recipe
from compressft.tasks import TASKS
from compressft.utils.phases import phase


@phase("analyses")
def analysed(recipe: Recipe, root: Path) -> dict[str, Any]:
    """The report's key `analyses`, what a recipe's analyses find; nothing where it has none.

    Args:
        root: the run directory, whose stages are finished.
    """
    found = [analysis.find(_subjects(recipe, root, analysis.models)).row(analysis) for analysis in recipe.analyses]
    return {"analyses": found} if found else {}


def analyse_models(kind: str, models: Sequence[str], settings: Sequence[str] = ()) -> tuple[Analysis, Finding]:
    """An analysis outside a recipe.

    Args:
        models: run directories, `model/`, `delta/` and `stages/NAME/` folders, folders of transformers, or hub ids.
            Where there is one run directory alone, its base and its last stage are compared.
        settings: "field=value", as `--set` gives them to a recipe.

    Raises:
        UserError: no such analysis or model, or they do not go together.
    """
    names = list(models)
    if len(names) == 1 and _is_run(Path(names[0])):
        names = [BASE, *names]
    try:
        asked: dict[str, Any] = {"type": kind, "models": names}
        override_all(asked, settings)
        analysis = parse_member(asked, ANALYSES, "analysis")
    except ValueError as error:
        raise UserError(f"analyse: {error}") from None
    reason = analysis.refuse()
    if reason:
        raise UserError(f"analyse: {reason}")
    runs = [name for name in names if _is_run(Path(name))]
    if BASE in names and not runs:
        raise UserError("analyse: 'base' is that of a run directory; give one, or the base's own name")

    if BASE not in names:
        return analysis, analysis.find(Subjects(tuple(names), _any))
    root = Path(runs[0])
    return analysis, analysis.find(_subjects(load_recipe(root / "recipe.yaml"), root, names))


def _subjects(recipe: Recipe, root: Path, names: Sequence[str]) -> Subjects:
    def base() -> dict[str, Tensor]:
        last = read_manifest(root / "stages" / recipe.stages[-1].name, "model", files=False)
        return base_tensors(recipe.model, last["architecture"])

    return Subjects(tuple(names), lambda name: _of_run(recipe, root, name), base)


def _of_run(recipe: Recipe, root: Path, name: str) -> nn.Module:
    """A model by the name that it has in a recipe."""
    if any(stage.name == name for stage in recipe.stages):
        return load_compressed(root / "stages" / name).eval()
    if name == BASE:
        # Under the class of the last stage, so that the names are those of the model that ships.
        return load_model(recipe.model, TASKS[recipe.shipped.task.type].auto_class).eval()
    return _any(name)


def _any(name: str) -> nn.Module:
    """A model by folder or hub id."""
    folder = Path(name).expanduser()
    if _is_run(folder):
        folder = folder / "model"
    if (folder / MANIFEST).is_file():
        return (load_delta if read_manifest(folder, files=False)["kind"] == "delta" else load_compressed)(folder).eval()
    return load_model(name).eval()


def _is_run(folder: Path) -> bool:
    return (folder / "recipe.yaml").is_file()
