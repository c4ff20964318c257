"""Two processes (gloo) train what one does on the same rows, method by method, and one of them writes the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from compressft.methods import METHODS
from compressft.methods.adapter import Adapter
from compressft.methods.diff import Diff
from compressft.methods.full import Full
from compressft.methods.head_gates import HeadGates
from compressft.methods.prefix import PrefixTuning
from compressft.methods.probe import Probe
from compressft.methods.side import Side
from compressft.objectives.distill import Distill
from compressft.passes.int8 import Int8
from compressft.passes.l0 import L0
from compressft.passes.movement import Movement
from compressft.passes.structured import Structured
from compressft.recipe.parts import TrainConfig
from compressft.recipe.recipe import load_recipe
from compressft.run.flow import run
from compressft.run.trainer import CompressionTrainer, Lesson
from compressft.tasks import make_task
from compressft.transform import Context, Transform
from compressft.utils import ranks
from tests.methods.added import save_adapter
from tests.methods.test_pairs import CASES as PAIR_CASES
from tests.methods.test_pairs import started
from tests.run.test_trainer import Pads, features
from tests.settings import made
from tests.share import drawn
from tests.tiny import PAIRS, pair_batch, tiny
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

STEPS, ROWS, RATE = 6, 48, 1e-3
State = dict[str, torch.Tensor]
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MOVEMENT = Movement(sparsity=0.5, start=0.0, end=0.5)
STRUCTURED = Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, start=0.0, end=0.6)


def quiet(**changes: Any) -> Any:
    """A tiny BERT without dropout."""
    return tiny(**QUIET, **changes)


def cases(folder: Path) -> dict[str, list[Transform]]:
    """What is trained, by name."""
    adapters = tuple(str(folder / f"adapter-{i}") for i in (0, 1))
    return {
        **{name: [made(name, adapters)] for name in METHODS if name not in DRAWS_NOISE},
        "mlp probe": [Probe(head="mlp", pooling="mean")],
        "bilstm probe": [Probe(head="bilstm", size=8, cache=False)],
        "pfeiffer": [Adapter(placement="pfeiffer", size=4)],
        "invertible": [Adapter(placement="pfeiffer", size=4, invertible=True)],
        "parallel": [Adapter(placement="parallel", size=4)],
        "flat prefix": [PrefixTuning(length=3, reparameterise=False)],
        "ladder": [Side(network="ladder", size=8)],
        # The teacher is wider: a projection that the loss alone reads.
        "passes": [Full(), Distill(teacher="wide", hidden=1.0), MOVEMENT, STRUCTURED, Int8()],
        "learned ranges": [Adapter(size=4), MOVEMENT, Int8(ranges="learned", momentum=0.9)],
    }


# Compared across processes below; their noise is not one process's.
DRAWS_NOISE = {"diff"}
ACCUMULATED = [Full()]
ENCODER_DECODERS = [(family, name) for family in PAIRS for name in PAIR_CASES]
NOISY = {"head gates": [HeadGates()], "diff": [Diff(density=0.3, end=0.7)], "l0": [Full(), L0(penalty=1.0)]}


def trained(
    transforms: list[Transform], output: Path, batch_size: int, accumulation: int = 1, steps: int = STEPS
) -> CompressionTrainer:
    """A run of the trainer from the same start."""
    torch.manual_seed(0)
    model, teacher = quiet(), quiet(hidden_size=48, seed=5)
    context = Context(tuple(sorted(transforms, key=lambda one: one.order)), {"wide": teacher.requires_grad_(False)})
    for transform in context.transforms:
        transform.prepare(model, context)
    config = TrainConfig(
        max_steps=steps or 1,
        batch_size=batch_size,
        gradient_accumulation=accumulation,
        learning_rate=RATE,
        precision="fp32",
        save="no",
        warmup=0,
    )
    task = make_task("sequence-classification", Pads(), 16, ["a", "b", "c"])
    rows = features(ROWS)
    if any(isinstance(one, Distill | Int8) for one in transforms):
        # Each process pads its own rows, and ranges see paddings; means over tokens are means of two means.
        rows = [{**row, "input_ids": (row["input_ids"] * 3)[:9], "attention_mask": [1] * 9} for row in rows]
    trainer = CompressionTrainer(model, Lesson(task, config, rows, rows[:7]), context, output)
    if steps:
        trainer.train()
    return trainer


def state(trainer: CompressionTrainer) -> State:
    return copied(trainer.model)


def copied(model: Any) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def pair_trained(family: str, name: str, steps: int = STEPS) -> Any:
    """An encoder-decoder trained on this process's share of a batch; no task of the command line has them."""
    model, method = started(name, family), PAIR_CASES[name]
    several = ranks.count() > 1
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if several else model
    share = slice(ranks.number(), None, ranks.count())
    batch = {key: rows[share].contiguous() for key, rows in pair_batch().items()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    model.train()
    for step in range(steps):
        wrapped(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        method.after_step(model, (step + 1) / steps)
    return model


def recipe_for(folder: Path, batch_size: int, **changes: Any) -> Path:
    """Two stages without dropout; the second one distils from the first."""
    train = {"max_steps": 4, "batch_size": batch_size, "precision": "fp32", "learning_rate": RATE, "save": 2}
    document = {
        "name": "pair",
        "model": str(folder / "base"),
        "data": {"train": str(folder / "train.jsonl"), "max_length": 16},
        "stages": [
            {"name": "teacher", "train": train},
            {
                "name": "student",
                "method": {"type": "adapter", "size": 4},
                "objectives": [{"type": "distill", "teacher": "teacher", "cache": True}],
                "passes": [{"type": "movement", "sparsity": 0.5, "start": 0.0}],
                "train": train,
            },
        ],
        "export": {"enabled": False},
    }
    path = folder / f"batch-{batch_size}.yaml"
    path.write_text(yaml.safe_dump(document | changes))
    return path


def work(folder: Path) -> None:
    """What each of the two processes does: all that was asked for, from one launch."""
    ranks.start()
    mine = folder / f"process-{ranks.number()}"
    found: dict[str, Any] = {"count": ranks.count(), "differing": {}, "tokens": {}, "terms": {}}
    asked = json.loads((folder / "asked.json").read_text())
    for name in asked["methods"]:
        transforms = {**cases(folder), **NOISY}[name]
        trainer = trained(transforms, mine, batch_size=4)
        torch.save(state(trainer), mine.with_name(f"{mine.name}-{name}.pt"))
        found["differing"][name] = ranks.differing(trainer.model)
        found["tokens"][name] = trainer.all_tokens()
        found["terms"][name] = trainer.drain_terms()
    accumulated = trained(ACCUMULATED, mine, batch_size=2, accumulation=2)
    torch.save(state(accumulated), mine.with_name(f"{mine.name}-accumulated.pt"))
    for family, name in asked["encoder-decoders"]:
        torch.save(copied(pair_trained(family, name)), mine.with_name(f"{mine.name}-{family}-{name}.pt"))
    report = run(load_recipe(recipe_for(folder, 4)), folder / "run-2")
    found["quality"] = report["quality"]
    (folder / f"found-{ranks.number()}.json").write_text(json.dumps(found))


def asked_for(items: list[pytest.Item]) -> dict[str, list[Any]]:
    """What this module's selected tests look at."""
    found = [item.callspec.params for item in items if item.path == Path(__file__) and hasattr(item, "callspec")]
    names = dict.fromkeys(one["name"] for one in found if "family" not in one)
    return {
        "methods": list(names),
        "encoder-decoders": [[one["family"], one["name"]] for one in found if "family" in one],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request) -> Path:
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("ddp")
    for i in (0, 1):
        save_adapter(folder / f"adapter-{i}", quiet, seed=i + 1)
    save_tiny(folder / "base", **QUIET)
    write_jsonl(folder / "train.jsonl", rows_of(60))
    (folder / "asked.json").write_text(json.dumps(asked_for(request.session.items)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found-{i}.json").read_text()) for i in (0, 1)]


def assert_close(got: State, want: State, start: State, limit: float = 1e-3) -> None:
    """Tensor by tensor, the two are apart by less than this share of how far training took one of them (L2)."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if not value.is_floating_point():
            assert torch.equal(got[name], value), name
        # A key's bias has no influence on the softmax: its gradient is rounding, which Adam scales up. A threshold is
        # one of the scores.
        elif not name.endswith(("key.bias", "key_bias", "threshold")):
            moved = (value - start[name] if name in start else value).norm()
            assert (got[name] - value).norm() <= limit * moved + 1e-6, name


# A buffer that collects a gradient; a loss with parameters of its own, counters and ranges; an optimiser of their own.
ALWAYS = ("head_gates", "passes", "learned ranges")
NAMES = drawn(2, cases(Path()), ALWAYS)


@pytest.mark.dear
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_does(name, folder, found, tmp_path):
    alone = trained(cases(folder)[name], tmp_path, batch_size=8)
    start = state(trained(cases(folder)[name], tmp_path, batch_size=8, steps=0))
    # One flipped rounding of int8 is a per cent of an activation.
    limit = 0.15 if any(isinstance(one, Int8) for one in cases(folder)[name]) else 1e-3
    assert_close(torch.load(folder / f"process-0-{name}.pt", weights_only=True), state(alone), start, limit)
    assert found[0]["tokens"][name] == found[1]["tokens"][name] == alone.tokens
    assert found[0]["terms"][name] == found[1]["terms"][name]
    assert found[0]["terms"][name] == pytest.approx(alone.drain_terms(), rel=limit)


def test_accumulated_batches_are_averaged_once(folder, tmp_path):
    alone, start = (trained(ACCUMULATED, tmp_path, 4, accumulation=2, steps=steps) for steps in (STEPS, 0))
    assert_close(torch.load(folder / "process-0-accumulated.pt", weights_only=True), state(alone), state(start))


@pytest.mark.parametrize(("family", "name"), drawn(1, ENCODER_DECODERS))
def test_encoder_decoders(family, name, folder):
    both = [torch.load(folder / f"process-{i}-{family}-{name}.pt", weights_only=True) for i in (0, 1)]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    alone, start = (copied(pair_trained(family, name, steps)) for steps in (STEPS, 0))
    assert any(not torch.equal(alone[key], start[key]) for key in start)
    assert_close(both[0], alone, start)


@pytest.mark.parametrize("name", [*NAMES, *drawn(1, NOISY)])
def test_all_processes_have_the_same_bits(name, folder, found):
    both = [torch.load(folder / f"process-{i}-{name}.pt", weights_only=True) for i in (0, 1)]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    assert found[0]["differing"][name] == []


def test_a_run_is_written_once(folder, found, tmp_path):
    """The whole flow with the same weights as one process's; the second process has the report too."""
    assert [one["count"] for one in found] == [2, 2]
    assert found[0]["quality"] == found[1]["quality"]
    run(load_recipe(recipe_for(folder, 8)), tmp_path / "run")
    base = load_file(folder / "base" / "model.safetensors")
    start = {f"bert.{name}": value for name, value in base.items()}
    for name in ("stages/teacher", "model"):
        both = [load_file(root / name / "model.safetensors") for root in (folder / "run-2", tmp_path / "run")]
        assert_close(*both, start)
    logs = [(root / "metrics.jsonl").read_text().splitlines() for root in (folder / "run-2", tmp_path / "run")]
    rows = [[(row["kind"], row["stage"], row["step"]) for row in map(json.loads, log)] for log in logs]
    assert rows[0] == rows[1]
    states = sorted(path.name for path in (folder / "run-2" / "checkpoints").glob("step-*/rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
