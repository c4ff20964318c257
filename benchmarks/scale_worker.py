"""One of the processes of `benchmarks.scale`: trains each case on its share of the rows, and says what that took."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from compressft.methods.adapter import Adapter
from compressft.methods.full import Full
from compressft.model.load import load_model
from compressft.model.source import load_tokenizer
from compressft.passes.int8 import Int8
from compressft.passes.movement import Movement
from compressft.passes.structured import Structured
from compressft.recipe.parts import TrainConfig
from compressft.run.trainer import CompressionTrainer, Lesson
from compressft.tasks import make_task
from compressft.transform import Context, Transform
from compressft.utils import ranks
from compressft.utils.quiet import quiet_libraries

MODEL = "minilm"
# Rows of a step over all processes, tokens of a row, steps, and those before the clock starts.
ROWS, LENGTH, STEPS, WARM = 16, 32, 6, 2
LABELS = ["a", "b", "c", "d"]
SOON: dict[str, Any] = {"start": 0.0, "end": 0.6}
CASES: dict[str, list[Transform]] = {
    "full": [Full()],
    "adapter": [Adapter(size=64)],
    "movement, structured": [Full(), Movement(sparsity=0.5, **SOON), Structured(heads=0.5, ffn=0.5, **SOON)],
    "int8": [Full(), Int8()],
}


class Watch(TrainerCallback):
    """Processor seconds behind the first steps, and what this process holds at the end."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.begun = self.seconds = 0.0
        self.held = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == WARM:
            self.begun = time.process_time()
        elif state.global_step == state.max_steps:
            self.seconds = time.process_time() - self.begun
            optimiser = self.trainer.optimizer
            moments = [value for entry in optimiser.state.values() for value in entry.values()]
            self.held = sum(_bytes(one) for one in [*self.trainer.step.parameters(), *moments])


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def train(transforms: list[Transform], folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """A few steps from the same start; figures, and under "state" the weights that they end with."""
    torch.manual_seed(0)
    # Each process's own dropout is no other's.
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model = load_model(MODEL, "AutoModelForSequenceClassification", new_head=True, num_labels=len(LABELS), **quiet)
    context = Context(tuple(sorted(transforms, key=lambda one: one.order)))
    for transform in context.transforms:
        transform.prepare(model, context)
    config = TrainConfig(
        max_steps=steps,
        batch_size=ROWS // ranks.count(),
        learning_rate=1e-4,
        warmup=0,
        precision="fp32",
        save="no",
    )
    task = make_task("sequence-classification", load_tokenizer(MODEL), LENGTH, LABELS)
    ids = torch.randint(1000, 20000, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": i % len(LABELS)} for i, row in enumerate(ids)]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    watch = Watch()
    trainer = CompressionTrainer(model, Lesson(task, config, rows, rows[:ROWS]), context, folder, [watch])
    watch.trainer = trainer
    trainer.args.eval_strategy = "no"  # type: ignore[assignment]
    trainer.train()
    return {
        "loss": sum(trainer.drain_terms().values()),
        "seconds": ranks.total(watch.seconds)[0] / (STEPS - WARM),
        "held": max(ranks.gathered(watch.held)),
        "differing": ranks.differing(model),
        "start": start,
        "state": model.state_dict(),
    }


def main() -> None:
    """Entry point; the argument is where to leave what was found."""
    folder = Path(sys.argv[1])
    ranks.start()
    quiet_libraries()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, transforms in CASES.items():
            result = train(transforms, Path(scratch))
            tensors = {kind: result.pop(kind) for kind in ("start", "state")}
            found[name] = result
            if ranks.first():
                for kind, state in tensors.items():
                    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / f"{name}.{kind}")
    if ranks.first():
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
