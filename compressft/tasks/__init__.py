"""Tasks: what a row means. One file and one row here adds one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compressft.tasks.causal import CausalLM
from compressft.tasks.classify import SequenceClassification
from compressft.tasks.regress import Regression
from compressft.tasks.tag import TokenClassification
from compressft.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    task.type: task for task in (SequenceClassification, Regression, TokenClassification, CausalLM)
}


def make_task(name: str, tokenizer: Any, max_length: int, labels: Sequence[str] = ()) -> Task:
    """The task of a recipe, ready to encode rows."""
    return TASKS[name](tokenizer, max_length, labels)
