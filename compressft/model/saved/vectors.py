"""Task vectors: what fine-tuning changed, as a thing of its own to store in few bytes, add, negate and apply.

Ilharco et al. (ICLR 2023). `TaskVector.between` and `TaskVector.of_delta` make one; `saved.delta.base_tensors` gives a
base's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.model.saved.codes import Code, decode, encode, shape_of
from compressft.model.saved.delta import base_of, base_tensors, load_delta
from compressft.model.saved.folders import read_manifest
from compressft.model.saved.state import plain_state
from compressft.model.source import content_hash
from compressft.utils.foreign import foreign

KIND = "task_vector"


@dataclass(frozen=True)
class TaskVector:
    """theta - theta0 of the tensors that a base has and training changed.

    Attributes:
        base: `content_hash` of the base's tensors; another base is refused.
        changes: the coded difference by tensor name (`saved.codes`), fp32.
        patches: tensor name -> (flat places int64, values): where theta0 + difference rounds to other bits than
            theta's; they make applying the vector as it was taken exact.
        own: tensors that the base lacks, such as a new head, whole. Arithmetic leaves them alone.
    """

    base: str
    changes: Mapping[str, Mapping[str, Tensor]]
    patches: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    own: Mapping[str, Tensor] = field(default_factory=dict)

    def difference(self, name: str) -> Tensor:
        """The decoded difference of one tensor."""
        return decode(self.changes[name])

    def encode(self, code: Code) -> TaskVector:
        """The same with every matrix coded; other tensors stay exact."""
        changes = {name: encode(self.difference(name), code) for name in self.changes}
        return replace(self, changes=changes, patches=self.patches if code.kind == "exact" else {})

    def __add__(self, other: TaskVector) -> TaskVector:
        """Sum of the differences; `own` is the left one's.

        Raises:
            UserError: they were taken on different bases.
        """
        if self.base != other.base:
            raise UserError("task vector: the two were made on different bases (content hashes differ); take one base")
        changes: dict[str, dict[str, Tensor]] = {}
        for name in [*self.changes, *(name for name in other.changes if name not in self.changes)]:
            parts = [vector.difference(name) for vector in (self, other) if name in vector.changes]
            changes[name] = {"exact": parts[0] if len(parts) == 1 else parts[0] + parts[1]}
        return TaskVector(self.base, changes, own=self.own)

    def __mul__(self, factor: float) -> TaskVector:
        changes = {name: {"exact": self.difference(name) * factor} for name in self.changes}
        return TaskVector(self.base, changes, own=self.own)

    __rmul__ = __mul__

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other

    def apply(self, base: Mapping[str, Tensor], scaling: float = 1.0) -> dict[str, Tensor]:
        """theta0 + scaling * difference for all tensors of the base, and `own`: what `load_state_dict` takes.

        With scaling 1, a vector that is neither coded nor computed gives back the bits of the model that it was taken
        from.

        Raises:
            UserError: this is another base than the vector's, or the vector is damaged.
        """
        if content_hash(base) != self.base:
            raise UserError("task vector: was made on another base (content hashes differ); give the right base")
        tensors = dict(base)
        for name, parts in self.changes.items():
            # Before it is decoded: a few bytes may stand for more than memory holds.
            if name not in base or shape_of(parts) != base[name].shape:
                wants = tuple(base[name].shape) if name in base else "no such tensor"
                raise UserError(f"task vector: {name!r} is {tuple(shape_of(parts))}, the base has {wants}; restore it")
            tensors[name] = _moved(base[name], self.difference(name), scaling)
            if scaling == 1.0 and name in self.patches:
                places, values = self.patches[name]
                tensors[name].view(-1)[places] = values
        return {**tensors, **self.own}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, every difference in its code."""
        from safetensors.torch import save_file

        tensors = {f"{name}#{part}": t for name, parts in self.changes.items() for part, t in parts.items()}
        for name, (places, values) in self.patches.items():
            tensors |= {f"{name}#patch_places": places, f"{name}#patch_values": values}
        tensors |= dict(self.own)
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"format": "pt", "kind": KIND, "base_hash": self.base})

    @classmethod
    def between(cls, base: Mapping[str, Tensor], tuned: nn.Module | Mapping[str, Tensor]) -> TaskVector:
        """The vector from a base to a fine-tuned model (or its tensors under the plain model's names).

        Tied weights are one tensor; integer buffers and other tensors that did not change are left out.

        Raises:
            UserError: a tensor has another shape or type than the base's, or the model has modules of its own.
        """
        if isinstance(tuned, nn.Module):
            tuned, extra = plain_state(tuned)
            if extra:
                raise UserError(
                    f"task vector: {next(iter(extra))!r} is no tensor of a plain model; use its delta/ folder"
                )
        changes, patches, own = {}, {}, {}
        for name, new in tuned.items():
            old = base.get(name)
            if old is None:
                own[name] = new.detach().clone()
                continue
            if (
                old.shape != new.shape
                or old.dtype != new.dtype
                or not (new.is_floating_point() or torch.equal(old, new))
            ):
                raise UserError(
                    f"task vector: {name!r} is {tuple(new.shape)} {new.dtype} and {tuple(old.shape)} {old.dtype} in "
                    "the base; a vector is taken between models of one shape"
                )
            new = new.detach().to(old.device)
            if torch.equal(old, new):
                continue
            difference = new.float() - old.float()
            changes[name] = {"exact": difference}
            places = torch.nonzero((_moved(old, difference, 1.0) != new).flatten()).flatten()
            if len(places):
                patches[name] = (places, new.reshape(-1)[places].clone())
        return cls(content_hash(base), changes, patches, own)

    @classmethod
    def of_delta(cls, folder: str | Path, base: str | None = None) -> TaskVector:
        """The vector of a run's `delta/` folder.

        Args:
            base: where the base is now (default: where the recipe found it).

        Raises:
            UserError: as `load_delta` and `between`.
        """
        model = load_delta(folder, base)
        name = base or base_of(Path(folder), read_manifest(folder, "delta", ("model",)))
        return cls.between(base_tensors(name, type(model).__name__), model)

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Read what `TaskVector.save` wrote.

        Raises:
            UserError: the file is not there, or is not a task vector.
        """
        from safetensors import safe_open

        with foreign(f"{path}: is no readable safetensors file"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("kind") != KIND or "base_hash" not in metadata:
            raise UserError(f"{path}: is not a task vector; give a file that TaskVector.save wrote")
        changes: dict[str, dict[str, Tensor]] = {}
        patches: dict[str, tuple[Tensor, Tensor]] = {}
        own: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name, _, part = key.partition("#")
            if not part:
                own[name] = tensor
            elif part == "patch_places":
                values = tensors.get(f"{name}#patch_values")
                if values is None or values.shape != tensor.shape:
                    raise UserError(f"{path}: {key!r} has no values of its number; the file is damaged")
                patches[name] = (tensor, values)
            elif part != "patch_values":
                changes.setdefault(name, {})[part] = tensor
        for name, parts in changes.items():
            with foreign(f"{path}: {name!r} is no coded tensor; the file is damaged"):
                shape_of(parts)
        return cls(metadata["base_hash"], changes, patches, own)


def _moved(old: Tensor, difference: Tensor, scaling: float) -> Tensor:
    """old + scaling * difference, computed in fp32, in the type of `old`."""
    moved = difference.to(old.device) if scaling == 1.0 else difference.to(old.device) * scaling
    return (old.float() + moved).to(old.dtype)
