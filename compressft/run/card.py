"""Model cards of what a run ships: metadata and results as the hub reads them, the report as their text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressft.data.source import DataConfig
from compressft.recipe.recipe import Recipe
from compressft.run.report.markdown import onnx_usage, render_markdown
from compressft.utils.hub import hub_id, pinned

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

CARD = "README.md"
# What the hub calls our tasks.
PIPELINES = {
    "sequence-classification": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "embedding": "feature-extraction",
    "seq2seq": "text2text-generation",
}
TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ text }}"
USAGE = '```python\nimport compressft\n\nmodel = compressft.load_{what}(".")  # the folder of this card\n```'


def write_cards(recipe: Recipe, root: Path, report: dict[str, Any]) -> None:
    """Write `README.md` into every folder of a finished run that ships: model/, delta/, onnx/ where there is one."""
    for part in ("model", "delta", "onnx"):
        if (root / part).is_dir():
            model_card(recipe, report, part).save(root / part / CARD)


def model_card(recipe: Recipe, report: dict[str, Any], part: str) -> ModelCard:
    """The card of one of a run's folders.

    Args:
        report: the run's report.json.
        part: the folder: "onnx", "model" or "delta".
    """
    from huggingface_hub import ModelCard, ModelCardData

    quality = report.get("quality") or {}
    dataset = recipe.shipped.data.dataset
    kinds = dict.fromkeys(one.type for stage in recipe.stages for one in (*stage.passes, *stage.objectives))
    data = ModelCardData(
        model_name=recipe.name,
        base_model=hub_id(recipe.model),
        datasets=None if dataset is None else [pinned(dataset)[0]],
        library_name="onnx" if part == "onnx" else "compressft",
        pipeline_tag=PIPELINES.get(recipe.shipped.task.type),
        metrics=[quality["metric"]] if quality.get("metric") else None,
        tags=["compressft", *(["onnx"] if part == "onnx" else []), *kinds],
        eval_results=_results(recipe, quality, part) or None,
    )
    usage = (
        onnx_usage(report, ".") if part == "onnx" else USAGE.format(what="delta" if part == "delta" else "compressed")
    )
    # A folder's place says something about a machine and nothing to a reader.
    shown = {**report, "model": recipe.model if hub_id(recipe.model) else Path(recipe.model).name}
    return ModelCard.from_template(data, template_str=TEMPLATE, text=render_markdown(shown, usage))


def _results(recipe: Recipe, quality: dict[str, Any], part: str) -> list[EvalResult]:
    """What was measured of this very folder, on the split of the report."""
    from huggingface_hub import EvalResult

    value = quality.get("onnx" if part == "onnx" else "torch")
    if value is None:
        return []
    data, task = recipe.shipped.data, recipe.shipped.task.type
    name = data.dataset or data.sample or Path(_first(data)).name
    dataset, revision = pinned(name) if data.dataset else (name, None)
    return [
        EvalResult(
            task_type=PIPELINES.get(task, task),
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_config=data.subset,
            dataset_split=quality["split"],
            dataset_revision=revision,
            metric_type=quality["metric"],
            metric_value=value,
        )
    ]


def _first(data: DataConfig) -> str:
    """The file that a source's rows are named after."""
    for files in (data.test, data.validation, data.train):
        if files:
            return files if isinstance(files, str) else files[0]
    return "data"
