"""For the tests of methods that add modules: models with every head, saved adapters, and what holds for all of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressft.evaluation.logits import open_session
from compressft.export.fold import fold
from compressft.export.onnx import save, to_graph
from compressft.methods.adapter import Adapter
from compressft.model.anatomy import anatomy
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.model.saved.state import plain_state
from compressft.model.surgery import checkpoint_activations
from compressft.passes.nf4 import Nf4
from compressft.transform import Context, Transform, trainable
from tests.tiny import TINY, batch_for, fit, labelled, logits, tiny

FAMILIES = ("bert", "roberta", "distilbert", "electra", "llama", "gpt2")
_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra"}
_NAMES |= {"llama": "Llama", "gpt2": "GPT2"}
# Every family, every head.
CASES = [(family, "sequence") for family in FAMILIES]
CASES += [("bert", "token"), ("llama", "token"), ("distilbert", "regression"), ("gpt2", "regression")]


def headed(family: str = "bert", head: str = "sequence", **changes: Any) -> Any:
    """A tiny model with a head for sequence or token classification, or regression."""
    kind = "TokenClassification" if head == "token" else "SequenceClassification"
    if head == "regression":
        changes |= {"num_labels": 1, "problem_type": "regression"}
    return tiny(family, architecture=f"{_NAMES[family]}For{kind}", **changes)


def rows_for(family: str, head: str = "sequence", rows: int = 4) -> dict[str, Tensor]:
    """A labelled padded batch for such a model."""
    batch = labelled(rows)
    pad = TINY[family][1].get("pad_token_id", 0)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    if head == "token":
        tags = batch["input_ids"] % 3
        batch["labels"] = tags.masked_fill(batch["attention_mask"] == 0, -100)
    elif head == "regression":
        batch["labels"] = torch.linspace(-1, 1, rows)
    return batch


def shaken(model: nn.Module, *parts: str) -> Any:
    """The model after moving every tensor with one of these in its name far enough to show in the logits."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(part in name for part in parts):
                generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def backbone_tensors(model: Any) -> dict[str, Tensor]:
    """What a delta of this plain model's fine-tuned self is a difference to."""
    prefix = f"{model.base_model_prefix}."
    return {name: tensor for name, tensor in plain_state(model)[0].items() if name.startswith(prefix)}


def save_adapter(folder: Path, base: Any = headed, seed: int = 1, **fields: Any) -> str:
    """Write a delta/ folder of an adapter (size 4, placement pfeiffer) with tensors of its own; the folder's name."""
    model, plain = base(), base()
    method = Adapter(**{"placement": "pfeiffer", "size": 4, **fields})
    method.prepare(model, Context(seed=seed))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for _, tensor in trainable(model):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    save_delta(model, None, backbone_tensors(plain), folder, {"model": "tiny"})
    return str(folder)


def prepared(method: Transform, model: Any, context: Context | None = None) -> Any:
    """The model with the method in it."""
    method.prepare(model, context or Context())
    return model.eval()


def trained(method: Transform, model: Any, batch: dict[str, Tensor], steps: int = 2) -> Any:
    """... after some steps and settled."""
    method.prepare(model, Context())
    fit(model, [method], [batch], steps)
    method.finalize(model)
    return model


def check_round_trips(model: Any, family: str, tmp_path: Path) -> None:
    """model/ and delta/ folders give the same logits to the bit."""
    batch = batch_for(family)
    want = logits(model, batch)
    save_compressed(model, None, tmp_path / "model", {})
    loaded = load_compressed(tmp_path / "model")
    assert torch.equal(logits(loaded, batch), want)
    assert {n: type(m) for n, m in loaded.named_modules()} == {n: type(m) for n, m in model.named_modules()}
    base = tmp_path / "base"
    tiny(family, architecture=type(headed(family).base_model).__name__).save_pretrained(base)
    save_delta(model, None, base_tensors(str(base)), tmp_path / "delta", {"model": str(base)})
    assert torch.equal(logits(load_delta(tmp_path / "delta"), batch), want)


def check_frozen_base(model: Any, plain: Any) -> None:
    """Every tensor of the plain backbone but its pooler is bit for bit what it was."""
    state = plain_state(model)[0]
    for name, tensor in backbone_tensors(plain).items():
        assert ".pooler." in name or torch.equal(tensor, state[name]), name


def gradients(method: Transform, base: Any, batch: dict[str, Tensor], checkpointing: bool) -> dict[str, Tensor]:
    """One step's gradients by name; dropout off."""
    model = base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    method.prepare(model, Context())
    if checkpointing:
        checkpoint_activations(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**batch).loss.backward()
    return {name: tensor.grad for name, tensor in trainable(model) if tensor.grad is not None}


def check_gradients(model: Any, batch: dict[str, Tensor], part: str) -> None:
    """The loss's slope in every trained tensor with `part` in its name is that of finite differences, in fp64."""
    model, generator = model.double().eval(), torch.Generator().manual_seed(0)
    model(**batch).loss.backward()
    checked = [tensor for name, tensor in trainable(model) if part in name]
    assert checked
    for tensor in checked:
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for step in (1e-5, -2e-5, 1e-5):
                tensor.add_(direction, alpha=step)
                losses.append(float(model(**batch).loss))
        got, want = float((tensor.grad * direction).sum()), (losses[0] - losses[1]) / 2e-5
        assert abs(got - want) < 1e-7 + 1e-4 * abs(want)


def check_checkpointing(method: Transform, family: str) -> None:
    """Recomputed activations give the same gradients."""
    both = [gradients(method, partial(headed, family), rows_for(family), on) for on in (False, True)]
    assert both[0].keys() == both[1].keys() and both[0]
    for name, gradient in both[0].items():
        torch.testing.assert_close(both[1][name], gradient, msg=name)


def check_autocast(method: Transform, family: str = "bert") -> None:
    """In bf16 a method whose parts all matter gives nearly its logits of fp32, and every gradient, in fp32."""
    model, batch = headed(family), rows_for(family)
    own = {name for name, _ in model.named_parameters()}
    prepared(method, model)
    method.after_step(model, 0.0)
    shaken(model, *(name for name, _ in trainable(model) if name not in own))
    want = logits(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = logits(model, batch)
        loss = model.train()(**batch).loss
    assert (got.float() - want).norm() < 0.05 * want.norm()
    loss.backward()
    for name, tensor in trainable(model):
        assert tensor.grad is not None and tensor.grad.dtype == torch.float32, name
        assert torch.isfinite(tensor.grad).all(), name


def check_nf4(method: Transform, family: str) -> None:
    """U7: on packed weights the method computes what it computes on the unpacked ones; training reaches it."""
    model, nf4 = headed(family), Nf4()
    for transform in (method, nf4):
        transform.prepare(model, Context([method, nf4]))
    check_packed(model)
    batch = rows_for(family)
    fit(model, [method, nf4], [batch], 2)
    before = logits(model, batch)
    for transform in (method, nf4):
        transform.finalize(model)
    torch.testing.assert_close(logits(model, batch), before, atol=1e-4, rtol=1e-4)


def check_packed(model: Any) -> None:
    """Every projection of the layers is stored in four bits, whatever else is in its slots."""
    for layer in anatomy(model).layers:
        for path in layer.linears:
            assert layer.part(path).store is not None, path


def check_export(model: Any, batch: dict[str, Tensor], tmp_path: Path, limit: float = 1e-4) -> Any:
    """The exported file computes the model's logits, also on a batch of another shape; returns the graph."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    graph = to_graph(fold(model), inputs)
    save(graph, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", 1)
    names = {value.name for value in session.get_inputs()}
    for part in (inputs, {name: value[1:2, :7] for name, value in inputs.items()}):
        feeds = {name: value.numpy() for name, value in part.items() if name in names}
        (got,) = session.run(["logits"], feeds)
        real = part["attention_mask"].bool().numpy()
        with torch.no_grad():
            want = model(**part).logits.numpy()
        got, want = (got[real], want[real]) if got.ndim == 3 else (got, want)
        assert np.abs(got - want).max() <= limit * max(want.std(), 1.0)
    return graph


def freeze_head(model: nn.Module) -> None:
    """Leave the model's head and pooler as they are, so that what else a method trains has to learn."""
    for name, parameter in model.named_parameters():
        if name in names_of(model):
            parameter.requires_grad_(False)


def names_of(model: nn.Module, *parts: str) -> set[str]:
    """Trainable names of the model's head and pooler, and every parameter with one of these in its name."""
    prefix = f"{model.base_model_prefix}."
    return {
        name
        for name, _ in model.named_parameters()
        if not name.startswith(prefix) or ".pooler." in name or any(part in name for part in parts)
    }
