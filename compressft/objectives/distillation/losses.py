"""Distances between a student's and a teacher's tensors; paddings never count, everything is summed in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compressft.modules.attention import Attended

# Far below any score; finite, so that a row that sees nothing gets no NaN.
HIDDEN = torch.finfo(torch.float32).min / 2


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), mean over rows; logits (rows, classes) fp32."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def masked_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens and features; states (B, T, d), mask (B, T, 1) boolean."""
    error = (student.float() - teacher.float()).square().masked_fill(~mask, 0.0)
    return error.sum() / (mask.sum() * student.shape[-1])


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """1 - cos, mean over real tokens (Sanh et al. 2019, section 2); states (B, T, d), mask (B, T) boolean."""
    distance = 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return distance.masked_fill(~mask, 0.0).sum() / mask.sum()


def visible(seen: Attended, real: Tensor) -> Tensor:
    """Which score entries exist: real query, real key, and the mask lets the one see the other; (B, 1, T, T) boolean.

    Args:
        real: (B, T) boolean, the batch's padding mask.
    """
    pairs = real[:, None, :, None] & real[:, None, None, :]
    if seen.mask is not None:
        return pairs & seen.mask
    return pairs.tril() if seen.causal else pairs


def scores(seen: Attended) -> Tensor:
    """Attention scores before softmax and masking, (B, Hq, T, T) fp32."""
    with torch.autocast(seen.query.device.type, enabled=False):
        return seen.query.float() @ _repeated(seen.key, seen).transpose(-1, -2) * seen.scaling


def relation(x: Tensor, seen: Attended, heads: int) -> Tensor:
    """Scaled products of queries, keys or values with themselves, (B, heads, T, T) fp32.

    All heads' features side by side are cut into `heads` relation heads (Wang et al. 2021, equation 3), so the numbers
    of attention heads may differ. Grouped keys and values are repeated as the queries see them.

    Args:
        x: `seen.query`, `seen.key` or `seen.value`.
    """
    joined = _repeated(x, seen).transpose(1, 2).flatten(2)
    cut = joined.unflatten(-1, (heads, -1)).transpose(1, 2)
    with torch.autocast(x.device.type, enabled=False):
        return cut @ cut.transpose(-1, -2) * cut.shape[-1] ** -0.5


def _repeated(x: Tensor, seen: Attended) -> Tensor:
    groups = seen.query.shape[1] // x.shape[1]
    x = x.float()
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def score_mse(student: Tensor, teacher: Tensor, seen: Tensor) -> Tensor:
    """Mean squared error over the entries that exist (Jiao et al. 2020, equation 7).

    Args:
        student, teacher: scores (B, H, T, T).
        seen: (B, 1, T, T) boolean.
    """
    error = (student - teacher).square().masked_fill(~seen, 0.0)
    return error.sum() / (seen.sum() * student.shape[1])


def probability_kl(student: Tensor, teacher: Tensor, seen: Tensor, mean: bool = False) -> Tensor:
    """KL(teacher's || student's distribution over keys), mean over real queries and heads; arguments as `score_mse`.

    Args:
        mean: compare the distributions averaged over heads, for models that have different numbers of them.
    """
    logs = [F.log_softmax(s.masked_fill(~seen, HIDDEN), dim=-1) for s in (student, teacher)]
    if mean:
        logs = [log.exp().mean(1, keepdim=True).clamp(min=torch.finfo(log.dtype).tiny).log() for log in logs]
    ours, theirs = logs
    terms = (theirs.exp() * (theirs - ours)).masked_fill(~seen, 0.0)
    return terms.sum() / (seen.any(-1).sum() * terms.shape[1])
