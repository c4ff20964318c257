"""What the tests of the passes on single weights share: training with their parameter groups, and what is zero."""

from __future__ import annotations

import random

import torch

from compressft.model.anatomy import anatomy
from compressft.modules.gate import Gate
from compressft.modules.linear import CompressedLinear, gates_of
from compressft.transform import Context, TrainingData
from tests.tiny import TINY, VOCABULARY, labelled, padded, tiny


def classifier(family: str):
    """A tiny classifier of a family (most decoders have a language model's head otherwise), and a batch for it."""
    name = (
        TINY[family][0]
        .replace("CausalLM", "SequenceClassification")
        .replace("LMHeadModel", "ForSequenceClassification")
    )
    batch = labelled()
    pad = TINY[family][1].get("pad_token_id", 0)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
    return tiny(family, architecture=name), batch


def context(transforms=(), seed: int = 0, rows: int = 40, **more) -> Context:
    """A Context with training rows of several lengths."""
    draw = random.Random(3)
    features = [
        {"input_ids": [draw.randrange(5, VOCABULARY) for _ in range(draw.randrange(3, 12))], "labels": i % 3}
        for i in range(rows)
    ]

    def collate(chosen):
        width = max(len(f["input_ids"]) for f in chosen)
        ids = torch.tensor([f["input_ids"] + [0] * (width - len(f["input_ids"])) for f in chosen])
        mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in chosen])
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([f["labels"] for f in chosen])}

    data = TrainingData(None, features, collate, lambda tokenizer: features)
    return Context(transforms=transforms, seed=seed, data=data, **more)


class Run:
    """A training run that can be stopped and gone on with, as the trainer does it: `train(4)`, `train(10)`."""

    def __init__(self, model, transforms, steps: int, batch=None, learning_rate: float = 3e-3) -> None:
        self.model, self.transforms, self.steps = model, transforms, steps
        self.batch = batch or labelled()
        self.context = context(transforms)
        for transform in transforms:
            transform.prepare(model, self.context)
        groups = [g for t in transforms for g in t.param_groups(model, self.context)]
        own = {id(p) for g in groups for p in g["params"]}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        self.optimiser = torch.optim.AdamW([{"params": rest}, *groups], lr=learning_rate, weight_decay=0.05)
        self.step = 0

    def train(self, until: int | None = None, watch=None):
        """Steps up to `until` (all); `watch(progress)` is called after each."""
        torch.manual_seed(self.step)
        self.model.train()
        for transform in self.transforms:
            transform.after_step(self.model, self.step / self.steps)
        while self.step < (self.steps if until is None else until):
            torch.manual_seed(100 + self.step)
            outputs = self.model(**self.batch)
            loss = outputs.loss
            for transform in self.transforms:
                loss = loss + sum(transform.loss(self.model, self.batch, outputs, self.context).values())
            loss.backward()
            self.optimiser.step()
            self.step += 1
            for transform in self.transforms:
                transform.after_step(self.model, self.step / self.steps)
            self.optimiser.zero_grad()
            if watch:
                watch(self.step / self.steps)
        self.model.eval()
        return self

    def take(self, checkpoint) -> Run:
        """Go on from a checkpoint: (model's state, optimiser's state, step)."""
        self.model.load_state_dict(checkpoint[0])
        self.optimiser.load_state_dict(checkpoint[1])
        self.step = checkpoint[2]
        return self

    def finalize(self):
        for transform in self.transforms:
            transform.finalize(self.model)


def linears(model):
    """(path, module) of the transformer layers' projections."""
    return [(f"{x.name}.{path}", x.part(path)) for x in anatomy(model).layers for path in x.linears]


def gated(one, model):
    """(layer, gate) for every gate of a pass, in the model's order."""
    return gates_of(model, one.type, Gate)


def weight(module):
    """(out, in) as the product uses it."""
    if isinstance(module, CompressedLinear):
        return module.effective_weight().detach()
    return module.weight.detach().t() if type(module).__name__ == "Conv1D" else module.weight.detach()


def nonzero(model) -> dict[str, int]:
    """Non-zero effective weights of every projection."""
    return {path: int(weight(module).count_nonzero()) for path, module in linears(model)}


def sparsity(model) -> float:
    """Fraction of exact zeros in all projections."""
    total = sum(weight(module).numel() for _, module in linears(model))
    return 1.0 - sum(nonzero(model).values()) / total


__all__ = ["Run", "classifier", "context", "gated", "linears", "nonzero", "padded", "sparsity", "weight"]
