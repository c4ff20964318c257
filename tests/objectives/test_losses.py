"""The distances by themselves: formulas written out again, equality gives 0, what is masked has no influence."""

import pytest
import torch

from compressft.modules.attention import Attended
from compressft.objectives.distillation.losses import (
    cosine_distance,
    masked_mse,
    probability_kl,
    relation,
    score_mse,
    scores,
    visible,
)

BATCH, HEADS, GROUPS, LENGTH, DIM = 3, 4, 2, 5, 6
REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()


def attended(seed: int = 0, heads: int = HEADS, kv: int = GROUPS, causal: bool = False, mask=None) -> Attended:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(BATCH, n, LENGTH, DIM, generator=generator) for n in (heads, kv, kv))
    return Attended(query.requires_grad_(), key, value, mask, causal, DIM**-0.5)


def test_visible_is_where_both_are_real_and_the_mask_agrees():
    both = attended()
    want = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    for b in range(BATCH):
        for i in range(LENGTH):
            for j in range(LENGTH):
                want[b, 0, i, j] = REAL[b, i] and REAL[b, j]
    assert torch.equal(visible(both, REAL), want)
    assert torch.equal(visible(attended(causal=True), REAL), want.tril())
    # A mask that is given says it all: causality is in it already.
    window = torch.ones(LENGTH, LENGTH).tril().triu(-1).bool()[None, None]
    assert torch.equal(visible(attended(causal=True, mask=window), REAL), want & window)


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_scores_repeat_grouped_keys(kv):
    seen = attended(kv=kv)
    got = scores(seen)
    for head in range(HEADS):
        want = seen.query[:, head] @ seen.key[:, head * kv // HEADS].transpose(1, 2) * DIM**-0.5
        torch.testing.assert_close(got[:, head], want)


@pytest.mark.parametrize("heads", [1, 3, 4, 8])
def test_relation_cuts_all_features_side_by_side(heads):
    seen = attended()
    for name in ("query", "key"):
        x = getattr(seen, name)
        got = relation(x, seen, heads)
        features = torch.cat([x[:, h * x.shape[1] // HEADS] for h in range(HEADS)], -1)
        width = HEADS * DIM // heads
        for head in range(heads):
            part = features[..., head * width : (head + 1) * width]
            torch.testing.assert_close(got[:, head], part @ part.transpose(1, 2) / width**0.5)


def test_scores_and_relations_are_in_fp32_under_autocast():
    seen = attended()
    want, related = scores(seen), relation(seen.value, seen, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scores(seen), want) and torch.equal(relation(seen.value, seen, 2), related)


def test_score_mse_is_the_mean_over_entries_that_exist():
    ours, theirs = attended(0), attended(1)
    seen = visible(ours, REAL)
    got = score_mse(scores(ours), scores(theirs), seen)
    keep = seen.expand(-1, HEADS, -1, -1)
    torch.testing.assert_close(got, (scores(ours) - scores(theirs))[keep].square().mean())


def test_probability_kl_equals_the_formula():
    ours, theirs = attended(0), attended(1)
    seen = visible(ours, REAL)
    total, rows = 0.0, 0
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(LENGTH):
                if REAL[b, i]:
                    p, q = (scores(x)[b, h, i][REAL[b]].double().softmax(-1) for x in (theirs, ours))
                    total, rows = total + (p * (p / q).log()).sum().item(), rows + 1
    assert probability_kl(scores(ours), scores(theirs), seen).item() == pytest.approx(total / rows, rel=1e-5)


def test_probability_kl_of_means_compares_models_with_other_numbers_of_heads():
    ours, theirs = attended(0, heads=4), attended(1, heads=2)
    seen = visible(ours, REAL)
    p, q = (
        scores(x).masked_fill(~seen, -torch.inf)[REAL.nonzero()[:, 0], :, REAL.nonzero()[:, 1]] for x in (theirs, ours)
    )
    p, q = (x.softmax(-1).mean(1) for x in (p, q))
    want = torch.where(p > 0, p * (p / q).log(), 0.0).sum() / REAL.sum()
    torch.testing.assert_close(probability_kl(scores(ours), scores(theirs), seen, mean=True), want)


@pytest.mark.parametrize("distance", [score_mse, probability_kl])
def test_equality_gives_no_loss_and_no_gradient(distance):
    ours = attended()
    loss = distance(scores(ours), scores(ours).detach(), visible(ours, REAL))
    loss.backward()
    assert abs(loss.item()) < 1e-6 and ours.query.grad.abs().max() < 1e-6


@pytest.mark.parametrize("distance", [score_mse, probability_kl])
@pytest.mark.parametrize("causal", [True, False])
def test_what_is_not_seen_has_no_influence(distance, causal):
    ours, theirs = attended(0, causal=causal), attended(1, causal=causal)
    seen = visible(ours, REAL)
    student = scores(ours).detach().requires_grad_()
    loss = distance(student, scores(theirs), seen)
    loss.backward()
    assert loss > 1e-2 and torch.isfinite(student.grad).all()
    assert (student.grad == 0)[~seen.expand_as(student)].all() and (student.grad != 0)[:1, :, 2, :2].all()
    wild = torch.where(seen, scores(theirs), 1e4)
    assert torch.equal(distance(student, wild, seen), loss)


def test_hidden_distances():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(BATCH, LENGTH, 7, generator=generator) for _ in range(2))
    got = cosine_distance(ours, theirs, REAL)
    a, b = ours[REAL], theirs[REAL]
    torch.testing.assert_close(got, 1 - ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).mean())
    target = torch.ones(len(a))
    torch.testing.assert_close(got, torch.nn.CosineEmbeddingLoss()(a, b, target))
    # Length does not matter, direction does.
    assert abs(cosine_distance(ours, 3.0 * ours, REAL).item()) < 1e-6
    assert cosine_distance(ours, -ours, REAL).item() == pytest.approx(2.0)
    torch.testing.assert_close(masked_mse(ours, theirs, REAL[..., None]), (a - b).square().mean())
    for distance, mask in ((cosine_distance, REAL), (masked_mse, REAL[..., None])):
        wild = torch.where(REAL[..., None], theirs, 1e4)
        assert torch.equal(distance(ours, wild, mask), distance(ours, theirs, mask))
