"""Which teacher layer each student layer follows. 0 stands for the embeddings' output, l for layer l's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from compressft.errors import UserError

Rule = Literal["uniform", "last", "origin", "learned"]
Pairs = tuple[tuple[int, int], ...]


def uniform(depth: int, teacher_depth: int) -> Pairs:
    """Layer i of L follows layer round(i * L_t / L), embeddings included (Jiao et al. 2020, section 4.1: g(m) = 3m)."""
    return tuple((i, round(i * teacher_depth / depth)) for i in range(depth + 1))


def origin(kept: Sequence[int], depth: int, teacher_depth: int) -> Pairs:
    """Every layer follows the teacher's layer of its own origin; `kept` are the indices that passes kept.

    Raises:
        UserError: the teacher is not as deep as the model that the layers were kept of.
    """
    if len(kept) != depth or kept[-1] >= teacher_depth:
        raise UserError(
            f"objective distill.layer_map: 'origin' wants a teacher as deep as the model was before layers went; this "
            f"one has {teacher_depth} layers; use uniform or pairs"
        )
    return ((0, 0), *((i + 1, layer + 1) for i, layer in enumerate(kept)))


def check(pairs: Sequence[tuple[int, int]], depth: int, teacher_depth: int) -> None:
    """Refuse pairs beyond the models' layers.

    Raises:
        UserError: the first such pair.
    """
    for student, teacher in pairs:
        if student > depth or teacher > teacher_depth:
            raise UserError(
                f"objective distill.layer_map: pair [{student}, {teacher}] is beyond the models' "
                f"{depth} and {teacher_depth} layers"
            )


@torch.no_grad()
def distances(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor) -> Tensor:
    """Mean squared distance of every student state to every teacher state, (len(student), len(teacher)) fp64.

    Args:
        student, teacher: hidden states (B, T, d) of one width.
        real: (B, T) boolean.
    """
    ours, theirs = (torch.stack([state[real].float().flatten() for state in states]) for states in (student, teacher))
    with torch.autocast(ours.device.type, enabled=False):
        product = (ours @ theirs.T).double()
    squares = [side.double().square().sum(1) for side in (ours, theirs)]
    return (squares[0][:, None] + squares[1][None, :] - 2.0 * product) / ours.shape[1]


def nearest_in_order(cost: Sequence[Sequence[float]]) -> list[int]:
    """The column of each row with the least sum of costs, the last row in the last column and no column before its
    predecessor's; strictly after it where there are more columns than rows (dynamic programming)."""
    rows, columns = len(cost), len(cost[0])
    strict = int(columns > rows)
    best = [list(cost[0])]
    for row in range(1, rows):
        previous, least, new = best[-1], float("inf"), []
        for column in range(columns):
            reach = column - strict
            if reach >= 0:
                least = min(least, previous[reach])
            new.append(cost[row][column] + least)
        best.append(new)
    chosen = [columns - 1]
    for row in range(rows - 2, -1, -1):
        reach = chosen[0] - strict
        chosen.insert(0, min(range(reach + 1), key=lambda column, row=row: best[row][column]))
    return chosen


def learned(student: Sequence[Tensor], teacher: Sequence[Tensor], real: Tensor) -> Pairs:
    """The map that is nearest now: each layer follows the teacher layer of least distance, in order.

    After CoFi (Xia, Zhong & Chen 2022, section 3.2, where teacher layers choose), with embeddings and last layers tied
    to each other, so that the student always covers the whole depth. A pure function of the states: it needs no state
    of its own, and the choice may change with every step.

    Args:
        student, teacher: all hidden states, embeddings first, of one width (projected).
        real: (B, T) boolean.
    """
    cost = distances(student[1:], teacher[1:], real).tolist()
    return ((0, 0), *((i + 1, column + 1) for i, column in enumerate(nearest_in_order(cost))))
