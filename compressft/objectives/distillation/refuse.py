"""Which settings of distillation make no sense, alone or with other Transforms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressft.objectives.distillation.layer_map import LEAVING
from compressft.transform import Transform

if TYPE_CHECKING:
    from compressft.objectives.distill import Distill

# Terms on what is inside the models, as against the task's loss and the logits.
INTERMEDIATE = ("hidden", "cosine", "attention", "relations")


def reason(config: Distill, others: Sequence[Transform]) -> str | None:
    """Why this cannot run so, field and fix in one line, or None."""
    types = {other.type for other in others}
    used = [name for name in INTERMEDIATE if getattr(config, name) > 0]
    found = (
        _beside(config, types, used)
        or _layers(config, types)
        or _left_over(config)
        or _phases(config, used)
        or _cached(config)
    )
    return found and f"objective distill.{found}"


def _beside(config: Distill, types: set[str], used: list[str]) -> str | None:
    if used and "probe" in types:
        return f"{used[0]}: method 'probe' keeps no hidden states to distil; set it to 0"
    if config.teacher == "base" and "full" in types:
        return "teacher: method 'full' trains the base itself; take an earlier stage or a folder as the teacher"
    if config.teacher == "base" and "depth" in types:
        return "teacher: pass 'depth' takes layers of the base away; take a folder or hub id as the teacher"
    return None


def _layers(config: Distill, types: set[str]) -> str | None:
    if config.layer_map == "learned" and config.hidden == 0:
        return "layer_map: 'learned' goes by the distances of hidden states; set hidden above 0"
    if config.layer_map == "origin" and not types & set(LEAVING):
        return "layer_map: 'origin' wants pass 'depth' or 'ziplm' in the same stage; use uniform or pairs"
    if config.layer_map == ():
        return "layer_map: has no pairs; give some, or leave it out"
    if isinstance(config.layer_map, tuple) and config.attention > 0 and not any(min(p) > 0 for p in config.layer_map):
        return "layer_map: pairs no layers, and embeddings attend to nothing; add layers or set attention to 0"
    return None


def _left_over(config: Distill) -> str | None:
    """Settings of a term that is off."""
    for name, term in (
        ("relation_map", "relations"),
        ("relation_heads", "relations"),
        ("attention_kind", "attention"),
        ("attention_heads", "attention"),
    ):
        if getattr(config, term) == 0 and getattr(config, name) != type(config).model_fields[name].default:
            return f"{name}: {term} is 0; set it, or leave {name} out"
    if config.projection is not None and not config.needs_hidden_states:
        return "projection: hidden and cosine are 0; set one, or leave projection out"
    return None


def _phases(config: Distill, used: list[str]) -> str | None:
    if config.intermediate_until is None:
        return None
    if not used:
        return f"intermediate_until: no term for the first phase; set one of {', '.join(INTERMEDIATE)}"
    if config.task == 0 and config.logits == 0:
        return "intermediate_until: no term for the second phase; set task or logits"
    return None


def _cached(config: Distill) -> str | None:
    if not config.cache:
        return None
    if config.teacher == "self":
        return "cache: the teacher 'self' changes with every step; set it to false"
    if config.attention > 0 or config.relations > 0:
        return "cache: keeps logits and hidden states only; set it to false, or attention and relations to 0"
    if config.logits == 0 and not config.needs_hidden_states:
        return "cache: nothing is asked of the teacher; set logits, hidden or cosine"
    return None
