"""N:M sparsity: every group exact, the cheapest groups first, and no columns that are cut."""

import pytest
import torch

from compressft.passes.n_m import NM
from compressft.recipe.program import Stage
from tests.passes.sparse import Run, gated, linears, weight
from tests.tiny import tiny


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 16)])
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_every_group_of_every_row_has_exactly_n(family, n, m):
    model = tiny(family)
    one = NM(n=n, m=m, start=0.0, end=0.5)
    run = Run(model, [one], 1)
    one.after_step(model, 0.5)
    run.finalize()
    for path, module in linears(model):
        groups = weight(module).unflatten(1, (-1, m))
        assert (groups.count_nonzero(-1) == n).all(), path


def test_groups_with_the_least_to_lose_go_first():
    model = tiny()
    one = NM(start=0.0, end=0.5, schedule="linear")
    Run(model, [one], 1)
    one.after_step(model, 0.2)
    for linear, gate in gated(one, model):
        groups = linear.weight.detach().abs().unflatten(1, (-1, 4))
        pruned = gate.mask.unflatten(1, (-1, 4)).sum(-1) == 2
        assert int(pruned.sum()) == round(0.4 * pruned.numel()) and (gate.mask.unflatten(1, (-1, 4)).sum(-1) >= 2).all()
        lost = groups.sort(-1).values[..., :2].sum(-1)
        assert lost[pruned].max() <= lost[~pruned].min()
    assert one.status(model, 0.2)["sparsity"]["now"] == pytest.approx(0.2, abs=1e-3)


def test_constant_prunes_all_at_once_and_looks_again_until_the_end():
    model = tiny()
    one = NM(start=0.2, end=0.6, schedule="constant")
    Run(model, [one], 1)
    one.after_step(model, 0.2)
    assert all(gate.mask.all() for _, gate in gated(one, model))
    seen = []
    for progress in (0.21, 0.5, 0.6, 0.9):
        one.after_step(model, progress)
        seen.append(torch.cat([gate.mask.flatten() for _, gate in gated(one, model)]))
        assert int(seen[-1].sum()) * 2 == seen[-1].numel()
        for linear, _ in gated(one, model):
            torch.nn.init.normal_(linear.weight)
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])


def test_recipes_are_checked():
    with pytest.raises(ValueError, match="n must be less than m"):
        Stage(name="one", passes=[{"type": "n_m", "n": 4, "m": 4}])
    with pytest.raises(ValueError, match="remove parts in an earlier stage"):
        Stage(name="one", passes=["n_m", {"type": "structured", "ffn": 0.5}])
