"""What PEFT knows of a model: its task, and whole modules saved next to an adapter, for us a task's head and pooler."""

from __future__ import annotations

from torch import nn

from compressft.adapters.settled import Settled, of_backbone
from compressft.model.anatomy import anatomy
from compressft.modules.linear import CompressedLinear

# End of an architecture's name -> PEFT's task.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "Model": "FEATURE_EXTRACTION",
}


def task_type(model: nn.Module) -> str | None:
    """PEFT's task for a model's architecture, None where it has none."""
    return next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)


def modules_to_save(settled: Settled, held: set[str]) -> list[str]:
    """Paths of the modules whose tensors have changed, but for those in `held`; of a head the whole."""
    parts = anatomy(settled.plain)
    pooler = parts.path(parts.family.pooler) if parts.family.pooler else None
    found: dict[str, None] = {}
    for name in settled.changed:
        if name in held:
            continue
        if pooler and name.startswith(f"{pooler}."):
            found[pooler] = None
        elif of_backbone(settled.plain, name):
            found[name.rpartition(".")[0]] = None
        else:
            found[name.partition(".")[0]] = None
    return list(found)


def unsaveable(settled: Settled, held: set[str]) -> str | None:
    """Why `modules_to_save` cannot hold what has changed besides `held`, or None."""
    base = settled.plain.state_dict(keep_vars=True)
    for name in settled.changed:
        if name in held:
            continue
        if name not in base or settled.changed[name].shape != base[name].shape:
            return f"PEFT's format has no place for tensor {name!r}"
        owner = name.rpartition(".")[0]
        if isinstance(settled.model.get_submodule(owner), CompressedLinear):
            return f"{name!r} is not the base's any more, and PEFT's format keeps projections as the base has them"
    uses = [id(tensor) for tensor in base.values()]
    for path in modules_to_save(settled, held):
        if any(uses.count(id(tensor)) > 1 for tensor in settled.plain.get_submodule(path).parameters()):
            return f"{path!r} shares a tensor with the embeddings, and PEFT's format saves modules whole"
    return None
