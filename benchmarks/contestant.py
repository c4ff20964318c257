"""One process that trains one method of one package, a few steps whenever it is asked to (`benchmarks.race`).

It runs in another environment too, so that nothing but `torch` and the package in question is imported. The first line
on standard output says what was built; then each number read from standard input is answered by as many step times.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BATCH, LENGTH, LABELS = 32, 64, 2
RATE = 1e-4


class Built(NamedTuple):
    """A model, how outputs and batch give its loss, and what follows every step."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor] = lambda outputs, batch: outputs.loss
    follow: Callable[[], None] = lambda: None


def compressft(model: str, method: Mapping[str, Any]) -> Built:
    """One of our methods."""
    from compressft.methods import METHODS
    from compressft.model.load import load_model
    from compressft.model.source import load_tokenizer
    from compressft.recipe.program import parse_member
    from compressft.transform import Context, TrainingData

    loaded = load_model(model, "AutoModelForSequenceClassification", num_labels=LABELS)
    transform = parse_member(method, METHODS, "method")
    features = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": 0} for row in tokens().tolist()]

    def collate(rows: Any) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    data = TrainingData(load_tokenizer(model), features, collate, lambda tokenizer: features, LENGTH)
    context = Context((transform,), data=data)
    transform.prepare(loaded, context)
    transform.after_step(loaded, 0.0)

    def loss(outputs: Any, batch: Any) -> Tensor:
        terms = [outputs.loss, *transform.loss(loaded, batch, outputs, context).values()]
        return torch.stack([term.float() for term in terms]).sum()

    # So early that all that is learned first is still being learned.
    return Built(loaded, loss, lambda: transform.after_step(loaded, 0.1))


def plain(model: str) -> Any:
    """The model as transformers gives it, with a new head."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(model, num_labels=LABELS)


def peft(model: str, config: Mapping[str, Any]) -> Built:
    """The `peft` package's own model; `config` has its fields."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_model

    values = dict(config)
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[values.pop("peft_type")]
    return Built(get_peft_model(plain(model).float(), kind(task_type="SEQ_CLS", **values)))


def adapters(model: str, config: Mapping[str, Any]) -> Built:
    """The `adapters` package; `config` names its configuration class and that one's fields."""
    import adapters as package  # type: ignore[import-not-found]

    loaded = plain(model)
    package.init(loaded)
    values = dict(config)
    loaded.add_adapter("one", config=getattr(package, values.pop("config"))(**values))
    loaded.train_adapter("one")
    return Built(loaded)


PACKAGES = {"compressft": compressft, "peft": peft, "adapters": adapters}


def tokens() -> Tensor:
    """(BATCH, LENGTH) token ids, the same in every process."""
    return torch.randint(1000, 20000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


@contextmanager
def counted(model: nn.Module, found: dict[int, int]) -> Iterator[None]:
    """Inside, storages that autograd saves come into {address: bytes}, each once; those of the model are left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def version(package: str) -> str:
    """A package's version; it may be a source tree on the path."""
    try:
        return installed(package)
    except PackageNotFoundError:
        return "source"


def peak(device: str) -> int:
    """Peak bytes so far: allocated on the GPU, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def libraries(model: nn.Module, device: str) -> int:
    """Resident bytes next to a model that has just been built; on a GPU there is nothing else."""
    if device == "cuda":
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return resident - sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Training:
    """A model, its batch and its optimiser."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        device = spec["device"]
        self.device, self.dtype = device, torch.bfloat16 if spec["precision"] == "bf16" else None
        model, self.loss, self.follow = PACKAGES[spec["package"]](spec["model"], spec["method"])
        for name, parameter in model.named_parameters():
            if any(part in name for part in spec["also"]):
                parameter.requires_grad_(True)
        self.model = model.to(device).train()
        self.other_bytes = libraries(self.model, device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in parameters)
        self.optimiser = torch.optim.AdamW(parameters, lr=RATE, fused=True)
        ids = tokens().to(device)
        labels = torch.arange(BATCH, device=device) % LABELS
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def forward(self) -> Tensor:
        """The loss."""
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None):
            return self.loss(self.model(**self.batch), self.batch)

    def saved_bytes(self) -> int:
        """What autograd keeps of one forward pass for the backward pass."""
        found: dict[int, int] = {}
        with counted(self.model, found):
            loss = self.forward()
        loss.backward()
        self.optimiser.zero_grad()
        return sum(found.values())

    def step(self) -> float:
        """One training step; its milliseconds."""
        start = time.perf_counter()
        self.forward().backward()
        self.optimiser.step()
        self.follow()
        self.optimiser.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Entry point; the argument is a JSON object, as `benchmarks.race` writes it."""
    # Libraries print too: answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    if spec["keep_memory"]:
        from compressft.utils.memory import keep_freed_memory

        keep_freed_memory()
    training = Training(spec)
    saved = training.saved_bytes()
    used = {name: version(name) for name in ("torch", "transformers", spec["package"])}
    print(json.dumps({"trained": training.trained, "saved_bytes": saved, "versions": used}), file=answers)
    for line in sys.stdin:
        times = [training.step() for _ in range(int(line))]
        print(json.dumps({"ms": times, "peak_bytes": peak(spec["device"]) - training.other_bytes}), file=answers)


if __name__ == "__main__":
    main()
