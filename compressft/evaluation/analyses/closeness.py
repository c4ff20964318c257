"""How close two models are in the space of their parameters, tensor by tensor."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from compressft.errors import UserError
from compressft.evaluation.analyses.analysis import BASE, Analysis, Finding, Subjects
from compressft.model.saved.state import plain_state
from compressft.modules.linear import CompressedLinear
from compressft.utils.phases import steps

COLUMNS = ("tensor", "L2", "mean |change|", "relative", "angle / pi", "signs flipped", "bf16 bits kept", "rank")
# Share of a change's energy that its `rank` holds.
ENERGY = 0.9
# A matrix whose smaller side is longer has no rank computed.
WIDEST = 4096


class Closeness(Analysis):
    """Distances between two models' weights as they act (Radiya-Dixit and Wang, AISTATS 2020).

    Per tensor: the L2 norm and the mean absolute value of the change, its L2 norm as a share of the first model's, the
    angle between the two as a share of pi, how many signs flipped, how many bits of bf16 stayed, and the rank that
    holds 90 % of the change's energy. Masks, differences and rounding of weights count; adapters stand next to them.
    """

    type: Literal["closeness"] = "closeness"
    wants: ClassVar[tuple[int, int]] = (2, 2)

    def find(self, subjects: Subjects) -> Finding:
        first, second = (_tensors(subjects, name) for name in subjects.names)
        common = [name for name in first if name in second and first[name].shape == second[name].shape]
        if not common:
            raise UserError(
                f"analysis closeness: {subjects.names[0]!r} and {subjects.names[1]!r} have no tensor of one name and "
                "shape; compare models of one base whose shapes are the same"
            )
        rows = tuple((name, *compared(first[name], second[name])) for name in steps(common, "comparing tensors"))
        moved = sum(float((second[name].double() - first[name].double()).square().sum()) for name in common)
        size = sum(float(first[name].double().square().sum()) for name in common)
        changed = sum(not torch.equal(first[name], second[name]) for name in common)
        relative = math.sqrt(moved / size) if size else 0.0
        return Finding(
            title=f"Closeness of {subjects.names[0]} and {subjects.names[1]}",
            sentence=f"{changed} of {len(common)} tensors differ; together they moved by {100 * relative:.2f} % of "
            "their norm",
            columns=COLUMNS,
            rows=rows,
            summary={"tensors": len(common), "changed": changed, "relative": relative, "l2": math.sqrt(moved)},
            notes=_left_out(first, second, subjects.names),
        )


def _tensors(subjects: Subjects, name: str) -> dict[str, Tensor]:
    if name == BASE and subjects.base is not None:
        return {name: value for name, value in subjects.base().items() if value.is_floating_point()}
    return acting(subjects.load(name))


@torch.no_grad()
def acting(model: nn.Module) -> dict[str, Tensor]:
    """A model's floating-point tensors under the plain names, linear layers' weights as they act."""
    tensors = {name: value for name, value in plain_state(model)[0].items() if value.is_floating_point()}
    for path, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            weight = module.effective_weight().detach().cpu()
            tensors[f"{path}.weight"] = weight.t().contiguous() if module.transposed else weight
    return tensors


def compared(first: Tensor, second: Tensor) -> tuple[float | int | None, ...]:
    """The columns for one tensor: L2, mean |change|, relative, angle / pi, flips, bits kept, rank."""
    a, b = first.double().flatten(), second.double().flatten()
    change = b - a
    norm = float(a.norm())
    return (
        float(change.norm()),
        float(change.abs().mean()),
        float(change.norm()) / norm if norm else None,
        angle(a, b),
        float((a * b < 0).double().mean()),
        bits_kept(first, second),
        rank(second.double() - first.double()),
    )


def angle(a: Tensor, b: Tensor) -> float | None:
    """arccos of the cosine over pi, in [0, 1]; None where one is zero.

    By the sine and cosine of half of it, which arccos near 1 cannot resolve (Kahan 2006, section 12).
    """
    if not float(a.norm()) or not float(b.norm()):
        return None
    u, v = a / a.norm(), b / b.norm()
    return 2.0 * math.atan2(float((u - v).norm()), float((u + v).norm())) / math.pi


def bits_kept(a: Tensor, b: Tensor) -> float:
    """Share of the bits of two tensors, each rounded to bf16, that are the same."""
    differing = a.bfloat16().view(torch.int16).int() ^ b.bfloat16().view(torch.int16).int()
    ones = sum(float((differing >> bit & 1).sum()) for bit in range(16))
    return 1.0 - ones / (16 * a.numel())


def rank(change: Tensor) -> int | None:
    """How many singular directions hold `ENERGY` of a matrix's energy; None for vectors and very large matrices."""
    if change.dim() != 2 or min(change.shape) > WIDEST:
        return None
    gram = change.t() @ change if change.shape[0] >= change.shape[1] else change @ change.t()
    energy = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cumsum(0)
    if not float(energy[-1]):
        return 0
    return int((energy < ENERGY * energy[-1]).sum()) + 1


def _left_out(first: dict[str, Tensor], second: dict[str, Tensor], names: tuple[str, ...]) -> tuple[str, ...]:
    shapes = [name for name in first if name in second and first[name].shape != second[name].shape]
    notes = [f"{len(shapes)} tensors have other shapes, such as {shapes[0]}, and are left out"] if shapes else []
    for who, own, other in ((names[0], first, second), (names[1], second, first)):
        alone = [name for name in own if name not in other]
        notes += [f"{len(alone)} tensors are in {who} alone, such as {alone[0]}"] if alone else []
    return tuple(notes)
