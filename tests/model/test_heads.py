"""Another task's head on the same backbone: the backbone and what was done to it stay, the head is the donor's."""

from __future__ import annotations

import pytest
import torch

from compressft.errors import UserError
from compressft.model.heads import with_head
from compressft.model.shrink import shapes
from tests.tiny import TINY, batch_for, gated, random_keep, tiny

# Families that both classify texts and predict tokens or tags, and the other class.
OTHERS = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "electra": "ElectraForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "llama": "LlamaForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}


def hidden(model, batch):
    with torch.no_grad():
        return model(**batch, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("family", OTHERS)
def test_there_and_back(family):
    """The backbone computes the same under either head, and coming back to the first head gives the first logits."""
    model, batch = tiny(family), batch_for(family)
    before, states = model(**batch).logits.detach(), hidden(model, batch)
    kept = tiny(family)
    other = with_head(model, tiny(family, architecture=OTHERS[family], seed=5), "stage")
    assert type(other).__name__ == OTHERS[family]
    torch.testing.assert_close(hidden(other, batch), states, rtol=0, atol=0)
    back = with_head(other, kept, "stage")
    assert type(back).__name__ == TINY[family][0]
    torch.testing.assert_close(back(**batch).logits.detach(), before, rtol=0, atol=0)


def test_a_language_models_output_layer_is_the_backbones_table():
    model = tiny("bert")
    table = model.get_input_embeddings().weight
    other = with_head(model, tiny("bert", architecture="BertForMaskedLM", seed=5), "stage")
    assert other.get_output_embeddings().weight is table
    names = [name for name, _ in other.named_parameters()]
    assert len(names) == len(set(names)) and not any("pooler" in name for name in names)


def test_the_configuration_has_the_donors_labels_and_the_models_shapes():
    model = tiny("bert", num_labels=3)
    donor = tiny("bert", architecture="BertForTokenClassification", num_labels=5)
    donor.config.id2label = dict(enumerate("abcde"))
    other = with_head(model, donor, "stage")
    assert other.config.id2label == dict(enumerate("abcde")) and other.config.num_labels == 5
    assert other.config is other.bert.config


def test_removed_parts_stay_removed():
    model, batch = tiny("bert"), batch_for("bert")
    gated(model, random_keep(model))
    states = hidden(model, batch)
    other = with_head(model, tiny("bert", architecture="BertForMaskedLM", seed=5), "stage")
    torch.testing.assert_close(hidden(other, batch), states, rtol=0, atol=0)
    assert shapes(other)


def test_another_width_is_refused():
    with pytest.raises(UserError, match=r"stages\.two: its head is for a width of 16"):
        with_head(tiny("bert"), tiny("bert", hidden_size=16), "stages.two")


def test_a_smaller_vocabulary_under_a_language_model_is_refused():
    donor = tiny("bert", architecture="BertForMaskedLM")
    with pytest.raises(UserError, match="97 pieces, and the vocabulary 50"):
        with_head(tiny("bert", vocab_size=50), donor, "stages.two")
