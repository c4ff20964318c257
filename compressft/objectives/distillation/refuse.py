"""Which settings of distillation make no sense together, and what they want of other Transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressft.transform import Resource, Want

if TYPE_CHECKING:
    from compressft.objectives.distill import Distill

# Terms on what is inside the models, as against the task's loss and the logits.
INTERMEDIATE = ("hidden", "cosine", "attention", "relations")
# Those of them on what attention computes with.
RECORDED = ("attention", "relations")


def contradiction(config: Distill) -> str | None:
    """Why these fields make no sense, field and fix in one line, or None."""
    found = _layers(config) or _left_over(config) or _phases(config) or _cached(config)
    return found and f"objective distill.{found}"


def wants(config: Distill) -> list[Want]:
    """What the two models must still have, or others of the stage must say, for what is compared."""
    found = []
    for term in _used(config):
        reason, fix = "compares what is inside the models", f"set {term} to 0"
        found.append(Want(Resource.INSIDE, reason, term, fix))
        if term in RECORDED:
            found.append(Want(Resource.ATTENTION, "compares attention between all pairs of tokens", term, fix))
    if config.teacher == "base":
        reason, fix = "'base' is the model as it was loaded", "take an earlier stage or a folder as the teacher"
        found += [Want(one, reason, "teacher", fix) for one in (Resource.VALUES, Resource.STARTING_LAYERS)]
    if config.teacher == "self":
        reason, fix = "'self' is to be the model before it was pruned", "name an earlier stage"
        found.append(Want(Resource.STARTING_SHAPES, reason, "teacher", fix))
    if config.layer_map == "origin":
        reason, fix = "'origin' follows the layers that were kept", "use uniform or pairs"
        found.append(Want(Resource.STARTING_LAYERS, reason, "layer_map", fix, given=True))
    return found


def _used(config: Distill) -> list[str]:
    return [name for name in INTERMEDIATE if getattr(config, name) > 0]


def _layers(config: Distill) -> str | None:
    if config.layer_map == "learned" and config.hidden == 0:
        return "layer_map: 'learned' goes by the distances of hidden states; set hidden above 0"
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


def _phases(config: Distill) -> str | None:
    if config.intermediate_until is None:
        return None
    if not _used(config):
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
