"""Bytes of each part of a run: counted by hand for shapes that are known."""

from __future__ import annotations

import pytest
import torch

from compressft.recipe.parts import ExportConfig
from compressft.recipe.program import Stage
from compressft.run.plan import footprint
from compressft.run.plan.footprint import (
    activation_bytes,
    calibration_bytes,
    export_bytes,
    logits_bytes,
    training_bytes,
)
from tests.tiny import tiny


def stage(**fields) -> Stage:
    train = {"batch_size": 4, "eval_batch_size": 1, "precision": "fp32", **fields.pop("train", {})}
    return Stage(name="only", train=train, **fields)


def bert(**changes):
    """Two layers, hidden size 32, FFN 64, four heads."""
    return tiny("bert", **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, **changes})


def test_scores_are_counted_where_they_are_written_down():
    """Attention with dropout writes them down on a CPU; without, torch's fused kernel keeps none."""
    dropped, plain = bert(attention_probs_dropout_prob=0.1), bert(attention_probs_dropout_prob=0.0)
    for length in (8, 64):
        more = activation_bytes(dropped, length, stage(), "cpu") - activation_bytes(plain, length, stage(), "cpu")
        assert more == 4 * 4 * length**2 * (2 * footprint.SCORE_BYTES + footprint.PASSING_SCORE_BYTES)
    assert activation_bytes(dropped, 8, stage(), "cuda") == activation_bytes(plain, 8, stage(), "cpu")


def test_what_scores_take_is_what_torch_keeps():
    """Of one attention with dropout, by the tensors that its graph saves."""
    from compressft.modules.dense_attention import attend

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    heads, length = 4, 64
    query, key, value = (torch.randn(1, heads, length, 2, requires_grad=True) for _ in range(3))
    module = torch.nn.Module()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(module, query, key, value, None, dropout=0.1, is_causal=False)
    scores = heads * length * length
    assert sum(size for size in kept.values() if size >= scores) == footprint.SCORE_BYTES * scores


def test_evaluation_counts_where_nothing_is_kept():
    model = bert()
    model.requires_grad_(False)
    small, large = (activation_bytes(model, 8, stage(train={"eval_batch_size": n}), "cpu") for n in (1, 64))
    assert large == 4 * 64 * 8 * (6 * 32 + 2 * 64) > small


def test_ziplm_has_every_layers_moments_at_once():
    ziplm = stage(passes=[{"type": "ziplm", "target": {"sparsity": 0.5}}])
    small, deep = bert(), bert(num_hidden_layers=6)
    moments, weights = 32**2 + 64**2, 32 * 32 + 32 * 64
    assert calibration_bytes(small, stage()) == 0
    assert calibration_bytes(small, ziplm) == 2 * (12 * moments + 8 * weights) + 24 * 64**2
    assert calibration_bytes(deep, ziplm) - calibration_bytes(small, ziplm) == 4 * (12 * moments + 8 * weights)
    # With a batch of one token there is little else; with a large one training takes more, and this is not added.
    wide = bert(intermediate_size=512)
    little, much = (training_bytes(wide, ziplm, [n], "cpu") for n in (1, 512))
    assert little["calibration"] > 0 == much["calibration"]


def test_export_counts_what_takes_more_writing_or_verifying():
    model = tiny("llama", architecture="LlamaForCausalLM")
    weights = 4 * sum(p.numel() for p in model.parameters())
    written = export_bytes(model, ExportConfig(batch=1), 2)
    assert written == {"weights": footprint.EXPORT_COPIES * weights, "process": footprint.EXPORT_PROCESS}
    verified = export_bytes(model, ExportConfig(batch=500), 100)
    vocabulary = model.config.vocab_size
    assert verified["weights"] == footprint.VERIFIED_COPIES * weights
    assert verified["logits"] > footprint.LOGITS_COPIES * 4 * 500 * 100 * vocabulary
    assert logits_bytes(model, 100, stage()) == footprint.LOGITS_COPIES * 4 * 4 * 100 * vocabulary
    assert logits_bytes(bert(), 100, stage()) == 0


@pytest.mark.parametrize(("optimizer", "each"), [("adamw_torch", 8), ("adamw_8bit", 2)])
def test_teachers_and_moments(optimizer, each):
    model = bert()
    count = sum(p.numel() for p in model.parameters())
    taught = stage(train={"optimizer": optimizer}, objectives=[{"type": "distill", "teacher": "big", "logits": 1.0}])
    found = training_bytes(model, taught, [8], "cpu")
    assert (found["weights"], found["gradients"], found["optimiser"]) == (8 * count, 4 * count, each * count)


def test_batches_of_changing_sizes_leave_more_between_them():
    model = bert()
    same, varied = (training_bytes(model, stage(), lengths, "cpu") for lengths in ([8, 8], [3, 8]))
    more = (footprint.VARIED_SHARE - footprint.ALLOCATOR_SHARE) * same["activations"]
    assert varied["allocator"] - same["allocator"] == pytest.approx(more, abs=1)
    assert {**varied, "allocator": 0} == {**same, "allocator": 0}
    assert training_bytes(model, stage(), [3, 8], "cuda") == training_bytes(model, stage(), [8, 8], "cuda")
