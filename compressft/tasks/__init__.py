"""Tasks: what a row means. One file and one row here adds one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressft.tasks.causal import CausalLM
from compressft.tasks.classify import SequenceClassification
from compressft.tasks.embedding import Embedding
from compressft.tasks.masked import MaskedLM
from compressft.tasks.regress import Regression
from compressft.tasks.seq2seq import Seq2Seq
from compressft.tasks.tag import TokenClassification
from compressft.tasks.task import Task, TaskSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASKS: dict[str, type[Task]] = {
    "sequence-classification": SequenceClassification,
    "regression": Regression,
    "token-classification": TokenClassification,
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "embedding": Embedding,
    "seq2seq": Seq2Seq,
}


def make_task(
    settings: TaskSettings | str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: Sequence[str] = (),
    config: Any = None,
) -> Task:
    """The task of a recipe, ready to encode rows; a name alone has the task's own defaults.

    Args:
        config: the configuration of the model that is trained.
    """
    kind, own = (settings, None) if isinstance(settings, str) else (settings.type, settings)
    return TASKS[kind](tokenizer, max_length, labels, own, config)
