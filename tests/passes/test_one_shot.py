"""Wanda and SparseGPT: what is measured, who goes, and how little the outputs change."""

import pytest
import torch

from compressft.methods.adapter import Adapter
from compressft.model.anatomy import anatomy
from compressft.modules.rank import keep_largest
from compressft.modules.sparsegpt import sparsegpt
from compressft.passes.shared.calibrate import second_moments
from compressft.passes.sparsegpt import SparseGPT
from compressft.passes.wanda import Wanda
from compressft.recipe.program import Stage
from tests.passes.sparse import Run, classifier, context, linears, sparsity, weight
from tests.tiny import TINY, logits, padded, tiny


def recorded(model, path, batches):
    """Inputs of a module at tokens that are no padding, (tokens, in)."""
    rows = []
    module = model.get_submodule(path)
    hook = module.register_forward_pre_hook(lambda m, inputs: rows.append(inputs[0].detach()))
    masks = []
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
            masks.append(batch["attention_mask"].bool())
    hook.remove()
    return torch.cat([x[m] for x, m in zip(rows, masks, strict=True)])


@pytest.mark.parametrize("family", TINY)
def test_second_moments_are_means_over_tokens_without_paddings(family):
    model = classifier(family)[0]
    batches = [padded(4, 9, seed=1), padded(3, 7, seed=2)]
    paths = [path for path, _ in linears(model)]
    found = second_moments(model, paths, batches)
    assert list(found) == paths
    for path in paths:
        x = recorded(model, path, batches).double()
        torch.testing.assert_close(found[path].double(), x.t() @ x / len(x), atol=1e-4, rtol=1e-4)


def test_second_moments_do_not_depend_on_padding_and_leave_the_model_alone():
    model = tiny()
    model.train()
    model.bert.encoder.layer[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.random.get_rng_state()
    batch = padded(4, 9)
    wide = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    path = "bert.encoder.layer.1.output.dense"
    one, other = (second_moments(model, [path], [b])[path] for b in (batch, wide))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state) and one.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters()) and not model.get_submodule(path)._forward_pre_hooks
    without = {"input_ids": batch["input_ids"]}
    assert second_moments(model, [path], [without])[path].shape == (64, 64)


def test_second_moments_of_nothing_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="saw no input"):
        second_moments(model, ["bert.pooler.dense"], [])
    model.spare = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'spare' saw no input"):
        second_moments(model, ["spare"], [padded()])


def test_wanda_compares_within_rows_by_weight_times_input_norm():
    model = tiny()
    run = Run(model, [Wanda(sparsity=0.4, rows=40)], 1)
    dense = tiny()
    layer = anatomy(dense).layers[0]
    for part in layer.projections:
        x = recorded(dense, f"{layer.name}.{part}", run.context.calibration(40, "test"))
        linear = anatomy(model).layers[0].part(part)
        score = linear.weight.detach().abs() * x.norm(dim=0)
        mask = linear.gates["wanda"].mask
        assert (mask.sum(1) == round(0.6 * 32)).all()
        low = score.masked_fill(~mask, torch.inf).amin(1)
        assert (low >= score.masked_fill(mask, 0).amax(1) * (1 - 1e-4)).all()


def test_later_layers_see_what_the_pruned_ones_give():
    model = tiny()
    run = Run(model, [Wanda(sparsity=0.6, rows=40)], 1)
    path = f"{anatomy(model).layers[1].name}.intermediate.dense"
    linear = model.get_submodule(path)
    pruned, dense = tiny(), tiny()
    Run(pruned, [Wanda(sparsity=0.6, rows=40)], 1)
    # The layer's own masks came after the measurement.
    for part in anatomy(pruned).layers[1].linears:
        del anatomy(pruned).layers[1].part(part).gates["wanda"]
    mask = linear.gates["wanda"].mask
    fits = []
    for other in (pruned, dense):
        norm = recorded(other, path, run.context.calibration(40, "test")).norm(dim=0)
        score = linear.weight.detach().abs() * norm
        low, high = score.masked_fill(~mask, torch.inf).amin(1), score.masked_fill(mask, 0).amax(1)
        fits.append(bool((low >= high * (1 - 1e-4)).all()))
    assert fits == [True, False]


def correlated(rows=400, columns=48, seed=0):
    """Inputs that share few directions, as hidden states do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, columns, generator=generator)
    scale = torch.rand(columns, generator=generator) * 2 + 0.1
    return (torch.randn(rows, 12, generator=generator) @ mix + torch.randn(rows, columns, generator=generator)) * scale


@pytest.mark.parametrize("groups", [None, (2, 4)])
def test_sparsegpt_reconstructs_better_than_wanda_and_wanda_better_than_magnitude(groups):
    x = correlated()
    w = torch.randn(20, 48, generator=torch.Generator().manual_seed(1))
    moment = x.t() @ x / len(x)
    new, mask = sparsegpt(w, moment, 0.5, groups)
    assert int(mask.sum()) == 480 and torch.equal(new != 0, mask)

    def error(pruned):
        return float((x @ (w - pruned).t()).square().mean())

    one = Wanda(pattern="2:4") if groups else Wanda(sparsity=0.5)
    linear = torch.nn.Linear(48, 20)
    linear.weight.data, linear.delta = w, None
    wanda = one.prune(linear, moment)
    plain = keep_largest([w.abs()], 480)[0] if groups is None else one.prune(linear, torch.eye(48))
    assert error(new) < 0.7 * error(w * mask) and error(new) < 0.7 * error(w * wanda)
    assert error(w * wanda) < error(w * plain)


def test_sparsegpt_moves_the_error_of_a_first_column_as_least_squares_does():
    x = correlated(columns=10).double()
    w = torch.randn(1, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w[0, 0] = 1e-3
    w[0, 1:] += 5 * w[0, 1:].sign()
    new, mask = sparsegpt(w, x.t() @ x, 0.1, damping=1e-12)
    assert mask[0].tolist() == [False] + [True] * 9
    best = torch.linalg.lstsq(x[:, 1:], x @ w[0]).solution
    torch.testing.assert_close(new[0, 1:], best, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (16, 300), (3, 130), (1, 1)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.95])
def test_sparsegpt_numbers_are_exact(shape, share):
    x = correlated(columns=shape[1])
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    new, mask = sparsegpt(w, x.t() @ x, share)
    assert int(mask.sum()) == round((1 - share) * w.numel()) and (new[~mask] == 0).all()
    assert new.dtype == w.dtype
    if share == 0.0:
        assert torch.equal(new, w)


def test_errors_reach_the_columns_of_later_blocks(monkeypatch):
    """A pattern is chosen group by group, so how many columns make a block must not matter."""
    x = correlated(columns=300)
    w = torch.randn(6, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for block in (128, 512, 4):
        monkeypatch.setattr("compressft.modules.sparsegpt.BLOCK", block)
        results.append(sparsegpt(w, x.t() @ x, 0.5, (2, 4))[0])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_inputs_that_are_never_there_cost_nothing():
    x = correlated(columns=16)
    x[:, [2, 9]] = 0.0
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    new, mask = sparsegpt(w, x.t() @ x, 0.25)
    assert torch.isfinite(new).all() and not mask[:, [2, 9]].any()
    same, _ = sparsegpt(w, torch.zeros(16, 16), 0.5)
    assert torch.isfinite(same).all()


@pytest.mark.parametrize("one", [SparseGPT(sparsity=0.5), SparseGPT(pattern="2:4")])
def test_the_whole_model_changes_less_than_by_masking(one):
    dense, batch = tiny(), padded(8, 10, seed=5)
    masked = tiny()
    other = Wanda(sparsity=one.sparsity, pattern=one.pattern)
    want = logits(dense, batch)
    Run(masked, [other], 1)
    pruned = tiny()
    Run(pruned, [one], 1)
    assert sparsity(pruned) == pytest.approx(0.5, abs=1e-3)
    errors = [float((logits(m, batch) - want).square().mean()) for m in (pruned, masked)]
    assert errors[0] < errors[1]


def test_it_is_the_same_twice_and_frozen_weights_are_changed_too():
    models = [tiny(), tiny()]
    for model in models:
        Run(model, [Adapter(size=4), SparseGPT(sparsity=0.5)], 1)
    first, second = (m.state_dict() for m in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    path = "bert.encoder.layer.0.attention.self.query"
    layer, old = models[0].get_submodule(path), tiny().get_submodule(path)
    assert not layer.weight.requires_grad
    kept = layer.gates["sparsegpt"].mask
    assert not torch.allclose(layer.weight[kept], old.weight[kept])


@pytest.mark.parametrize("one", [Wanda(sparsity=0.5), SparseGPT(pattern="2:4")], ids=lambda one: one.type)
def test_training_revives_nothing(one):
    model = tiny()
    run = Run(model, [one], 5)
    zeros = {path: weight(module) == 0 for path, module in linears(model)}
    run.train()
    run.finalize()
    assert all(torch.equal(weight(module) == 0, zeros[path]) for path, module in linears(model))


def test_recipes_are_checked():
    for fields, message in (
        ({}, "either sparsity"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "either sparsity"),
        ({"pattern": "4:2"}, "wants N:M with 0 < N < M"),
        ({"pattern": "half"}, "wants N:M with 0 < N < M"),
        ({"sparsity": 1.0}, "sparsity"),
    ):
        for name in ("wanda", "sparsegpt"):
            with pytest.raises(ValueError, match=message):
                Stage(name="one", passes=[{"type": name, **fields}])
    with pytest.raises(ValueError, match="prune in an earlier stage"):
        Stage(name="one", method="adapter", passes=["nf4", {"type": "sparsegpt", "sparsity": 0.5}])


def test_the_calibration_set_is_drawn_from_the_training_rows():
    assert sum(len(b["input_ids"]) for b in context().calibration(13, "test")) == 13
