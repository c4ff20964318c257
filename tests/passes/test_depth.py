"""The depth pass: which layers stay, what they are, what is refused, and training next to a deeper teacher."""

import pytest
import torch

from compressft.errors import UserError
from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.objectives.distill import Distill
from compressft.passes.depth import Depth
from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.transform import REMOVES, Context
from tests.tiny import TINY, fit, labelled, logits, tiny


@pytest.mark.parametrize(
    ("keep", "depth", "want"),
    [
        (6, 12, [0, 2, 4, 7, 9, 11]),
        (3, 6, [0, 2, 5]),
        (3, 12, [0, 6, 11]),
        (2, 6, [0, 5]),
        (1, 12, [0]),
        (4, 4, [0, 1, 2, 3]),
        ((1, 3), 4, [1, 3]),
    ],
)
def test_which_layers_stay(keep, depth, want):
    assert Depth(keep=keep).kept(depth) == want


def test_a_number_keeps_both_ends_and_no_layer_twice():
    for depth in range(2, 33):
        for keep in range(2, depth + 1):
            kept = Depth(keep=keep).kept(depth)
            assert len(set(kept)) == keep and kept[0] == 0 and kept[-1] == depth - 1 and kept == sorted(kept)


def test_the_layers_are_copies():
    student, teacher = tiny(num_hidden_layers=4), tiny(num_hidden_layers=4)
    Depth(keep=(0, 3)).prepare(student, Context())
    assert Depth(keep=1).order == REMOVES and student.config.num_hidden_layers == 2
    for layer, source in zip(anatomy(student).layers, (0, 3), strict=True):
        want = anatomy(teacher).layers[source].module.state_dict()
        assert all(torch.equal(v, want[n]) for n, v in layer.module.state_dict().items())


@pytest.mark.parametrize("family", TINY)
def test_all_layers_kept_is_the_same_model(family):
    model, batch = tiny(family), labelled(4)
    want = logits(model, batch)
    Depth(keep=2).prepare(model, Context())
    assert torch.equal(logits(model, batch), want)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (5, "pass depth.keep: 5 layers asked for; the model has 4"),
        ((0, 4), r"pass depth.keep: layers \[0, 4\]: want ascending indices of 0 to 3"),
        ((2, 1), "want ascending indices"),
        ((1, 1), "want ascending indices"),
    ],
)
def test_layers_that_are_not_there(keep, said):
    with pytest.raises(UserError, match=said):
        Depth(keep=keep).prepare(tiny(num_hidden_layers=4), Context())


@pytest.mark.parametrize("keep", [0, ()])
def test_no_layer_is_refused(keep):
    assert "keep at least one" in Depth(keep=keep).check()
    assert Depth(keep=1).check() is None


def test_attention_that_depends_on_a_layers_number_is_refused():
    with pytest.raises(UserError, match="scales attention by its layers' numbers"):
        Depth(keep=1).prepare(tiny("gpt2", scale_attn_by_inverse_layer_idx=True), Context())


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_trained_with_everything_and_loaded_again(family, tmp_path):
    """Dropped layers, pruned and quantised and distilled in one run; the saved folder gives the same logits."""
    changes = {"n_layers": 4} if family == "distilbert" else {"num_hidden_layers": 4}
    changes["architecture"] = "LlamaForSequenceClassification" if family == "llama" else None
    student, teacher, batch = tiny(family, **changes), tiny(family, **changes), labelled(8)
    transforms = [
        Depth(keep=2),
        Distill(teacher="t", hidden=1.0, attention=1.0, relations=1.0, relation_heads=4, layer_map="origin"),
        Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.5),
        Int8(),
    ]
    context = Context(transforms=transforms, load_teacher=lambda name: teacher)
    for transform in transforms:
        transform.prepare(student, context)
    assert student.distillation.pairs == ((0, 0), (1, 1), (2, 4))
    fit(student, transforms, [batch], steps=8, context=context)
    before = logits(student, batch)
    for transform in transforms:
        transform.finalize(student)
    want = logits(student, batch)
    torch.testing.assert_close(want, before, atol=0.1 * float(before.std()), rtol=0.0)
    save_compressed(student, None, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert len(anatomy(loaded).layers) == 2 and torch.equal(logits(loaded, batch), want)
