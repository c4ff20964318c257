"""Ask a teacher: a model of its own, the student's own weights uncompressed, or the base it started from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.surgery import head_parameters
from compressft.modules.attention import Attended, Recorder, recording
from compressft.modules.bottleneck import AdaptedOutput
from compressft.modules.linear import bare, dense

# Teachers that are the student itself, with some of its modules off.
OWN: dict[str, Callable[[], AbstractContextManager[None]]] = {"self": dense, "base": bare}
# Modules of ours that hold the base's own parameters: those that stand where such a layer stood, and one around it.
HOLDERS = (nn.Linear, nn.Embedding, nn.LayerNorm, AdaptedOutput)


@dataclass
class Answer:
    """What a teacher says to a batch: logits, hidden states and attention inputs by layer (0 = embeddings)."""

    logits: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    attended: dict[int, Attended] = field(default_factory=dict)


def attention_modules(model: nn.Module, layers: set[int]) -> dict[nn.Module, int]:
    """The attention modules of these layers (counted from 1), for a Recorder."""
    return {x.part(x.family.attention): x.index + 1 for x in anatomy(model).layers if x.index + 1 in layers}


@torch.no_grad()
def ask(
    teacher: nn.Module, kind: str, inputs: Mapping[str, Tensor], hidden: set[int], modules: Mapping[nn.Module, int]
) -> Answer:
    """Run the teacher in eval mode without a graph.

    Args:
        kind: "self" or "base" where the teacher is the student itself, anything else where it is a model of its own.
        hidden: layers whose hidden states are wanted.
        modules: attention modules whose inputs are wanted (`attention_modules`).
    """
    own = OWN.get(kind)
    recorder = Recorder(modules) if modules else None
    was_training = teacher.training
    if own is not None:
        teacher.eval()
    try:
        with own() if own is not None else nullcontext(), recording(recorder):
            outputs = teacher(**inputs, output_hidden_states=bool(hidden))
    finally:
        if own is not None:
            teacher.train(was_training)
    states = {layer: outputs.hidden_states[layer] for layer in hidden}
    return Answer(outputs.logits, states, recorder.taken if recorder is not None else {})


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by path, whose own parameters `bare()` computes with: all but those that methods and passes add."""
    added: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(prefix) for prefix in added):
            continue
        if type(module).__module__.startswith("compressft.") and not isinstance(module, HOLDERS):
            added.append(f"{path}.")
        else:
            yield path, module


def check_base(model: nn.Module, logits: bool) -> None:
    """Refuse the `base` teacher where training changes it, or where its logits say nothing.

    Raises:
        UserError: a parameter of the base is trained, or logits are asked of a head that is new.
    """
    head = {id(parameter) for _, parameter in head_parameters(model)}
    for path, module in base_modules(model):
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.requires_grad and id(parameter) not in head:
                raise UserError(
                    f"objective distill.teacher: 'base' wants the base's weights frozen, the method trains {name}; "
                    "use a method that adds modules only, or an earlier stage or a folder as the teacher"
                )
    # A trained one is refused above: a language model's output layer is the base's.
    if logits and model.get_output_embeddings() is None:  # type: ignore[operator]
        raise UserError(
            "objective distill.logits: the teacher 'base' has no trained head of its own, its logits would be the "
            "student's untrained head on other features; set it to 0 and use hidden, attention, relations or cosine"
        )


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that the `base` teacher computes with and nothing trains: its identity."""
    tensors: dict[str, Tensor] = {}
    for path, module in base_modules(model):
        tensors |= {n: p for n, p in module.named_parameters(path, recurse=False) if not p.requires_grad}
        tensors |= dict(module.named_buffers(path, recurse=False))
        store = getattr(module, "store", None)
        if isinstance(store, nn.Module):
            tensors |= dict(store.named_buffers(f"{path}.store"))
    return tensors
