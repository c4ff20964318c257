"""The effective weight of a (weight, gate) pair, built once and kept until either of the two changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

# gate -> weight -> (stamp, effective weight); both keys are weak, so an entry lives no longer than its two tensors.
_kept = WeakIdKeyDictionary()
_steps = 0


def _stepped(optimizer: object, args: object, kwargs: object) -> None:
    """Fused and 8-bit optimisers write through pointers and leave `_version` as it was: any step outdates all."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_stepped)


def _keepable(tensor: Tensor) -> bool:
    """A plain CPU tensor with a version counter. A CUDA graph would replay a kept weight after it is outdated."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and not tensor.is_inference()


def _stamp(tensor: Tensor) -> tuple[Hashable, ...]:
    """What in-place changes, `set_` and an assignment to `.data` alter (the last one keeps the version)."""
    storage = StorageWeakRef(tensor.untyped_storage())
    return tensor._version, storage, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()


def effective_weight(weight: Tensor, gate: Tensor, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
    """`build()`, or what it gave last time for the same weight, gate and key. To be called where no gradient is traced.

    Unseen, as by autograd itself: writing into `tensor.data` or through numpy other than in an optimiser's step; call
    `torch.autograd.graph.increment_version(tensor)` after it.
    Never kept while tracing, for tensor subclasses, or off the CPU.
    """
    if torch.compiler.is_compiling() or not (_keepable(weight) and _keepable(gate)):
        return build()
    stamp = (key, _steps, _stamp(weight), _stamp(gate))
    of_gate = _kept.get(gate)
    if of_gate is None:
        of_gate = _kept[gate] = WeakIdKeyDictionary()
    kept = of_gate.pop(weight, None)
    if kept is None or kept[0] != stamp:
        kept = None  # frees the outdated one before its successor is allocated
        kept = (stamp, build())
    if type(kept[1]) is Tensor:
        of_gate[weight] = kept
    return kept[1]
