"""What a method has to stand whatever it trains: recomputed activations, a resume, folders, other heads."""

from __future__ import annotations

import torch

from compressft.model.load import load_model
from compressft.model.saved.compressed import load_compressed, save_compressed
from compressft.model.saved.delta import base_tensors, load_delta, save_delta
from compressft.model.surgery import checkpoint_activations
from compressft.transform import Context, trainable
from tests.methods.added import freeze_head, headed, rows_for
from tests.passes.sparse import Run, classifier
from tests.tiny import fit, labelled, logits, tiny


def gradients(method, family: str = "bert", checkpointing: bool = False) -> dict[str, torch.Tensor]:
    """One step's gradients by name, the activations kept or computed again in the backward pass."""
    model, batch = classifier(family)
    method.prepare(model, Context())
    method.after_step(model, 0.0)
    if checkpointing:
        checkpoint_activations(model)
    torch.manual_seed(0)
    outputs = model.train()(**batch)
    (outputs.loss + sum(method.loss(model, batch, outputs, Context()).values())).backward()
    return {name: parameter.grad for name, parameter in trainable(model) if parameter.grad is not None}


def check_checkpointing(method, family: str = "bert") -> None:
    """Dropout and the method's own noise are the same when a layer is computed again."""
    kept, again = gradients(method, family), gradients(method, family, checkpointing=True)
    assert kept.keys() == again.keys() and kept
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


def check_learns(method, head: str, alone: bool, steps: int = 60, learning_rate: float = 1e-2) -> None:
    """On token classification (paddings without a label) or regression the loss of a few rows falls.

    Args:
        alone: without the model's head.
    """
    model, batch = headed("bert", head), rows_for("bert", head, 8)
    assert head != "token" or bool(batch["labels"].eq(-100).any())
    method.prepare(model, Context((method,)))
    if alone:
        freeze_head(model)
    before = loss_of(model, batch)
    fit(model, [method], [batch], steps, learning_rate)
    method.finalize(model)
    after = loss_of(model, batch)
    assert after < 0.75 * before, (before, after)


@torch.no_grad()
def loss_of(model, batch) -> float:
    """The loss in eval mode."""
    return float(model.eval()(**batch).loss)


def check_resume(method, steps: int = 8, others=(), stops=(3,)) -> None:
    """A run that is stopped and goes on has the bits of one that is left alone."""

    def run():
        return Run(tiny(), [method, *others], steps)

    whole = run().train()
    for stop in stops:
        first = run().train(stop)
        second = run().take((first.model.state_dict(), first.optimiser.state_dict(), first.step)).train()
        for one in (first, second):
            assert one.model.state_dict().keys() == whole.model.state_dict().keys()
        settled = [r.model.state_dict() for r in (whole, second)]
        assert all(torch.equal(settled[0][name], settled[1][name]) for name in settled[0]), stop
        if stop == stops[-1]:
            whole.finalize()
            second.finalize()
            assert torch.equal(logits(whole.model, labelled()), logits(second.model, labelled()))


def check_folders(method, folder, steps: int = 4, **train) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train, settle (which moves no logit), save model/ and delta/: both load to the same logits, bit for bit.

    Returns:
        the tensors in delta.safetensors, and the base's.
    """
    from safetensors.torch import load_file

    tiny("bert", architecture="BertModel").save_pretrained(folder / "base")
    base = base_tensors(str(folder / "base"))
    model = load_model(str(folder / "base"), "AutoModelForSequenceClassification", num_labels=3)
    run = Run(model, [method], steps, **train).train()
    batch = labelled()
    before = logits(model, batch)
    run.finalize()
    after = logits(model, batch)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    save_delta(model, None, base, folder / "delta", {"model": str(folder / "base")})
    save_compressed(model, None, folder / "model", {})
    assert torch.equal(logits(load_delta(folder / "delta"), batch), after)
    assert torch.equal(logits(load_compressed(folder / "model"), batch), after)
    return load_file(folder / "delta" / "delta.safetensors"), base
