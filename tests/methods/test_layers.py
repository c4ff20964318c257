"""Partial fine-tuning: the trainable set by name, no graph below the cut, tied heads stay frozen."""

import pytest
import torch

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.model.anatomy import anatomy
from compressft.transform import Context, trainable
from tests.tiny import labelled, tiny


@pytest.mark.parametrize("top", [0, 1, 2])
def test_trainable_set(check_training, top):
    model = tiny()
    roots = ("bert.pooler.", "classifier.", *(f"bert.encoder.layer.{1 - i}." for i in range(top)))
    check_training(model, Layers(top=top), {n for n, _ in model.named_parameters() if n.startswith(roots)})


def test_more_layers_than_there_are():
    with pytest.raises(UserError, match=r"method\.top: 3 layers asked for; the model has 2"):
        Layers(top=3).prepare(tiny(), Context())


@pytest.mark.parametrize("top", [0, 1, 2])
def test_nothing_is_saved_below_the_cut(top):
    model, batch = tiny(), labelled()
    Layers(top=top).prepare(model, Context())
    model.train()
    inside, saved = [], [0, 0]

    def enter(index):
        return lambda *_: inside.append(index)

    for layer in anatomy(model).layers:
        layer.module.register_forward_pre_hook(enter(layer.index))
        layer.module.register_forward_hook(lambda *_: inside.clear())

    def pack(tensor):
        for index in inside:
            saved[index] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    assert [number > 0 for number in saved] == [top > 1, top > 0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoders_train_the_norm_above_the_top_layer(family):
    model = tiny(family)
    last = {"llama": "model.norm.", "gpt2": "transformer.ln_f."}[family]
    stack = {"llama": "model.layers.1.", "gpt2": "transformer.h.1."}[family]
    Layers(top=1).prepare(model, Context())
    names = {name for name, _ in trainable(model)}
    # The output layer is pretrained, tied (gpt2) or not (llama).
    assert names == {n for n, _ in model.named_parameters() if n.startswith((last, stack))}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_train_what_belongs_to_the_top_layers(family):
    model = tiny(family)
    Layers(top=1).prepare(model, Context())
    top = {"t5": ("decoder.block.1.", "decoder.final_layer_norm."), "bart": ("model.decoder.layers.1.",)}[family]
    assert {name for name, _ in trainable(model)} == {n for n, _ in model.named_parameters() if n.startswith(top)}


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "BertForMaskedLM", "LlamaForCausalLM"])
def test_a_tied_head_stays_frozen(architecture):
    family = {"G": "gpt2", "B": "bert", "L": "llama"}[architecture[0]]
    model = tiny(family, architecture=architecture, tie_word_embeddings=True)
    output, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert output is table
    Layers(top=1).prepare(model, Context())
    assert not table.requires_grad
    # A masked language model's head is pretrained as well.
    assert not any(n.startswith(("cls.", "lm_head.")) for n, _ in trainable(model))
