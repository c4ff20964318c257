"""Choose rows of a pool by finished models; chosen once in a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from compressft.data.rows import ROW_KEY, Row
from compressft.data.splits import load_pool
from compressft.data.table import taken
from compressft.evaluation.logits import by_row, model_run
from compressft.model.saved.compressed import load_compressed
from compressft.model.source import load_tokenizer
from compressft.recipe.program import Stage
from compressft.recipe.steps import Select
from compressft.run.feed import Feeds
from compressft.run.records import Run
from compressft.tasks.encode import encoded
from compressft.tasks.task import Task
from compressft.utils.memory import release
from compressft.utils.phases import phase


def make_selections(run: Run, feeds: Feeds, stage: Stage) -> None:
    """Make the selections before a stage, or read those that were made; their rows join the feeds that name them."""
    for select in stage.select:
        rows = run.folder.memo(f"select-{select.name}", lambda one=select: _chosen(run, feeds, one))
        feeds.join(select.name, rows)


@phase("search")
def _chosen(run: Run, feeds: Feeds, select: Select) -> list[Row]:
    recipe = run.recipe
    stages = {stage.name: stage for stage in recipe.stages}
    task = feeds.of(stages[select.by[0]]).task
    labelled = select.type == "uncertain"
    pool = load_pool(recipe.sources[select.pool], task.fields, labelled)
    before = {row[ROW_KEY] for name in _earlier(recipe.stages, select) for row in feeds.joined.get(name, ())}
    pool = pool.select([i for i, row in enumerate(pool) if row[ROW_KEY] not in before]) if before else pool
    beliefs = []
    for name in select.by:
        folder = run.folder.stage(name)
        model, task = load_compressed(folder), task.remade(load_tokenizer(str(folder)))
        logits = by_row(model_run(model, task), task, encoded(pool, task), recipe.evaluation_batch)
        beliefs.append(probabilities(np.stack(logits)) if logits else np.zeros((0, len(task.labels))))
        release(model)
    order, labels = choose(select, beliefs)
    chosen = zip(taken(pool, order), order, strict=True)
    rows = [row if labelled else _labelled(row, task, labels[i]) for row, i in chosen]
    said = f"{select.name}: {len(rows)} of {len(pool)} rows of {select.pool or 'the data'} chosen ({select.type})"
    if not rows and len(pool) and not labelled:
        surest = max(float(np.min([belief[i].max() for belief in beliefs])) for i in range(len(pool)))
        said += f"; the surest has {surest:.2f}, and above is {select.above:g}"
    run.say(said)
    return rows


def choose(select: Select, beliefs: Sequence[np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Which rows are chosen, the best first, and the label of every row.

    Args:
        beliefs: one for each stage, probabilities (rows, labels).
    """
    mean = np.mean(beliefs, axis=0)
    labels = mean.argmax(-1)
    if select.type == "uncertain":
        score = -(mean * np.log(np.maximum(mean, 1e-12))).sum(-1)
        may = np.ones(len(mean), dtype=bool)
    else:
        # How sure the least sure of them is of the label that all would have to give.
        score = np.min([belief[np.arange(len(mean)), labels] for belief in beliefs], axis=0)
        may = (score >= select.above) & np.all([belief.argmax(-1) == labels for belief in beliefs], axis=0)
    # Rows of one score stay in the pool's order.
    order = [int(i) for i in np.argsort(-score, kind="stable") if may[i]]
    return order[: select.rows], labels


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    powers = np.exp(shifted)
    return powers / powers.sum(-1, keepdims=True)


def _labelled(row: Row, task: Task, label: Any) -> Row:
    assert task.fields.answer is not None
    return {**row, task.fields.answer: task.labels[int(label)]}


def _earlier(stages: Sequence[Stage], select: Select) -> list[str]:
    """Selections from the same pool that were made before this one."""
    found = []
    for stage in stages:
        for one in stage.select:
            if one.name == select.name:
                return found
            if one.pool == select.pool:
                found.append(one.name)
    return found
