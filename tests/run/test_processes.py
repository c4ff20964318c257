"""Two processes (gloo), with copies (DDP) or pieces (FSDP2) of the weights, train what one does on the same rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from compressft.errors import UserError
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
from compressft.run.share import shared_out
from compressft.run.trainer import CompressionTrainer, Lesson
from compressft.tasks import make_task
from compressft.transform import Context, Transform
from compressft.utils import ranks
from tests.methods.added import save_adapter
from tests.methods.test_pairs import CASES as PAIR_CASES
from tests.methods.test_pairs import started
from tests.run.killed import Killed
from tests.run.test_trainer import Pads, features
from tests.settings import made
from tests.share import drawn
from tests.tiny import PAIRS, pair_batch, tiny
from tests.tiny_folder import rows_of, save_tiny, write_jsonl

STEPS, ROWS, RATE = 6, 48, 1e-3
KINDS = ("ddp", "fsdp2")
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# A step of the second stage, behind a checkpoint.
KILLED_AT = 8
State = dict[str, torch.Tensor]
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MOVEMENT = Movement(sparsity=0.5, start=0.0, end=0.5)
SOON = {"start": 0.0, "end": 0.6}
STRUCTURED = Structured(heads=0.5, ffn=0.5, align=8, floor_ffn=8, **SOON)
EVERYTHING = Structured(heads=0.5, ffn=0.5, layers=0.5, hidden=0.25, align=8, align_hidden=8, floor_ffn=8, **SOON)
LEARNED = Structured(decide="learned", sparsity=0.5, gates=("heads", "ffn", "layers"), align=8, floor_ffn=8, **SOON)
PHASES = Distill(teacher="wide", hidden=1.0, attention=1.0, attention_heads="mean", intermediate_until=0.5)
STATEFUL = ("int4", "depth", "magnitude", "movement", "block", "n_m", "structured")


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
        "head gates": [HeadGates()],
        "learned parts": [Full(), LEARNED],
        "all parts": [Full(), EVERYTHING],
        "soft": [Full(), Movement(variant="soft", start=0.0, end=0.5)],
        "own teacher": [Full(), Distill(teacher="self", hidden=1.0), MOVEMENT],
        "phases": [Full(), PHASES],
        "four bits": [Adapter(size=4), made("nf4")],
        **{f"pass {name}": [Full(), made(name)] for name in STATEFUL},
    }


# What is drawn in the forward pass is each process's own: compared across processes below.
DRAWS_NOISE = {"diff"}
ACCUMULATED = [Full()]
ENCODER_DECODERS = [(family, name) for family in PAIRS for name in PAIR_CASES]
NOISY = {"noisy diff": [Diff(density=0.3, end=0.7)], "noisy l0": [Full(), L0(penalty=1.0)]}


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


class Trained(NamedTuple):
    """What one process, or several, came to."""

    start: State
    end: State
    tokens: int
    terms: dict[str, float]


@contextmanager
def drawn_apart(seed: int) -> Iterator[None]:
    """What several processes draw together, in one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@cache
def alone(name: str, folder: Path) -> Trained:
    """What one process comes to on the rows of both."""
    start = state(trained(cases(folder)[name], folder / "alone", batch_size=8, steps=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "same_draws", drawn_apart)
        trainer = trained(cases(folder)[name], folder / "alone", batch_size=8)
    return Trained(start, state(trainer), trainer.tokens, trainer.drain_terms())


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
    return written(folder / f"batch-{batch_size}.yaml", document | changes)


def written(path: Path, document: dict[str, Any]) -> Path:
    """A recipe's file; both processes write it, and neither reads half of the other's."""
    staging = path.with_suffix(f".{ranks.number()}")
    staging.write_text(yaml.safe_dump(document))
    staging.replace(path)
    return path


def feeds_for(folder: Path, batch_size: int) -> Path:
    """One stage of two feeds, each with a head of its own."""
    sources = {"two": "train.jsonl", "three": "three.jsonl"}
    feeds = [{"data": "two"}, {"data": "three", "share": 0.4}]
    stage = {"name": "both", "feeds": feeds, "train": {"epochs": 1, "batch_size": batch_size, "precision": "fp32"}}
    document = {
        "name": "feeds",
        "model": str(folder / "base"),
        "data": {name: {"train": str(folder / file), "max_length": 16} for name, file in sources.items()},
        "stages": [stage],
        "export": {"enabled": False},
    }
    return written(folder / f"feeds-{batch_size}.yaml", document)


@contextmanager
def killing(rank: int | None) -> Iterator[None]:
    """Inside, training ends amid the second stage: of one process altogether, or of all of them with an exception."""
    training_step, count = CompressionTrainer.training_step, 0

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == KILLED_AT and rank is None:
            raise Killed
        if count == KILLED_AT and rank == ranks.number():
            os._exit(9)
        return training_step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressionTrainer, "training_step", step)
        yield


def work(folder: Path) -> None:
    """What each of the two processes does: all that was asked for, from one launch."""
    ranks.start()
    asked = json.loads((folder / "asked.json").read_text())
    found: dict[str, Any] = {"count": ranks.count(), "differing": {}, "tokens": {}, "terms": {}, "quality": {}}
    for kind in KINDS:
        ranks.shard(kind == "fsdp2")
        work_in(folder, kind, asked, found)
    if "test_killed_and_resumed" in asked["tests"]:
        for kind, other in (KINDS, KINDS[::-1]):
            # What one kind has saved, the other goes on with.
            ranks.shard(other == "fsdp2")
            run(load_recipe(recipe_for(folder, 4)), folder / f"killed-{kind}", resume=True)
    (folder / f"found-{ranks.number()}.json").write_text(json.dumps(found))


def work_in(folder: Path, kind: str, asked: dict[str, Any], found: dict[str, Any]) -> None:
    """What is asked for of one kind."""
    mine = folder / f"{kind}-{ranks.number()}"
    for name in [name for name, its in asked["methods"] if its == kind]:
        trainer = trained({**cases(folder), **NOISY}[name], mine, batch_size=4)
        torch.save(state(trainer), mine.with_name(f"{mine.name}-{name}.pt"))
        key = f"{name} {kind}"
        found["differing"][key] = ranks.differing(trainer.step.model)
        found["tokens"][key], found["terms"][key] = trainer.all_tokens(), trainer.drain_terms()
    tests = asked["tests"]
    if "test_accumulated_batches_are_averaged_once" in tests:
        accumulated = trained(ACCUMULATED, mine, batch_size=2, accumulation=2)
        torch.save(state(accumulated), mine.with_name(f"{mine.name}-accumulated.pt"))
    if "test_a_run_is_written_once" in tests:
        found["quality"][kind] = run(load_recipe(recipe_for(folder, 4)), folder / f"run-{kind}")["quality"]
    if "test_several_feeds" in tests:
        run(load_recipe(feeds_for(folder, 4)), folder / f"feeds-{kind}")
    if "test_killed_and_resumed" in tests:
        with killing(None), suppress(Killed):
            run(load_recipe(recipe_for(folder, 4)), folder / f"killed-{kind}")
        ranks.wait()
        if ranks.first():
            shutil.copytree(folder / f"killed-{kind}", folder / f"killed-{kind}-alone")
        ranks.wait()
    if kind == "ddp":
        for family, name in asked["encoder-decoders"]:
            torch.save(copied(pair_trained(family, name)), mine.with_name(f"{mine.name}-{family}-{name}.pt"))


def asked_for(items: list[pytest.Item]) -> dict[str, list[Any]]:
    """What this module's selected tests look at."""
    mine = [item for item in items if item.path == Path(__file__)]
    found = [item.callspec.params for item in mine if hasattr(item, "callspec")]
    methods = dict.fromkeys((one["name"], one["kind"]) for one in found if "kind" in one and "name" in one)
    return {
        "tests": sorted({item.originalname for item in mine}),
        "methods": list(methods),
        "encoder-decoders": [[one["family"], one["name"]] for one in found if "family" in one],
    }


def launch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two processes of this file's."""
    return subprocess.run(
        [*LAUNCH, __file__, str(folder), *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What is trained, and on what."""
    folder = tmp_path_factory.mktemp("processes")
    for i in (0, 1):
        save_adapter(folder / f"adapter-{i}", quiet, seed=i + 1)
    save_tiny(folder / "base", **QUIET)
    rows = rows_of(60)
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "three.jsonl", [{**row, "label": f"l{i % 3}"} for i, row in enumerate(rows)])
    return folder


@pytest.fixture(scope="module")
def folder(files, request) -> Path:
    """Where two processes have left what they found."""
    (files / "asked.json").write_text(json.dumps(asked_for(request.session.items)))
    done = launch(files)
    assert done.returncode == 0, done.stderr[-6000:]
    return files


@pytest.fixture(scope="module")
def found(folder) -> list[dict[str, Any]]:
    return [json.loads((folder / f"found-{i}.json").read_text()) for i in (0, 1)]


@pytest.fixture(scope="module")
def one(files) -> Path:
    """A run of one process."""
    run(load_recipe(recipe_for(files, 8)), files / "run-alone")
    return files / "run-alone"


def assert_same_run(got: Path, want: Path, *names: str) -> None:
    """These models of two runs are as close as rounding lets them be."""
    base = load_file(want.parent / "base" / "model.safetensors")
    start = {f"bert.{name}": value for name, value in base.items()}
    for name in names or ("stages/teacher/model", "model/model"):
        assert_close(*(load_file(root / f"{name}.safetensors") for root in (got, want)), start)


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


# A mask that collects a gradient; a loss with parameters of its own, counters and ranges; an optimiser of their own.
ALWAYS = ("head_gates", "passes", "learned ranges")
NAMES = drawn(2, cases(Path()), ALWAYS)


@pytest.mark.dear
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_does(name, kind, folder, found):
    want, key = alone(name, folder), f"{name} {kind}"
    # One flipped rounding of int8 is a per cent of an activation.
    limit = 0.15 if any(isinstance(one, Int8) for one in cases(folder)[name]) else 1e-3
    assert_close(torch.load(folder / f"{kind}-0-{name}.pt", weights_only=True), want.end, want.start, limit)
    assert found[0]["tokens"][key] == found[1]["tokens"][key] == want.tokens
    assert found[0]["terms"][key] == found[1]["terms"][key]
    assert found[0]["terms"][key] == pytest.approx(want.terms, rel=limit)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_are_averaged_once(kind, folder, tmp_path):
    alone, start = (trained(ACCUMULATED, tmp_path, 4, accumulation=2, steps=steps) for steps in (STEPS, 0))
    assert_close(torch.load(folder / f"{kind}-0-accumulated.pt", weights_only=True), state(alone), state(start))


@pytest.mark.parametrize(("family", "name"), drawn(1, ENCODER_DECODERS))
def test_encoder_decoders(family, name, folder):
    both = [torch.load(folder / f"ddp-{i}-{family}-{name}.pt", weights_only=True) for i in (0, 1)]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    alone, start = (copied(pair_trained(family, name, steps)) for steps in (STEPS, 0))
    assert any(not torch.equal(alone[key], start[key]) for key in start)
    assert_close(both[0], alone, start)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, *drawn(1, NOISY)])
def test_all_processes_have_the_same_bits(name, kind, folder, found):
    both = [torch.load(folder / f"{kind}-{i}-{name}.pt", weights_only=True) for i in (0, 1)]
    assert all(torch.equal(both[0][key], both[1][key]) for key in both[0])
    assert found[0]["differing"][f"{name} {kind}"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_written_once(kind, folder, found, one):
    """The whole flow with the same weights as one process's; the second process has the report too."""
    assert [its["count"] for its in found] == [2, 2]
    assert found[0]["quality"][kind] == found[1]["quality"][kind]
    assert_same_run(folder / f"run-{kind}", one)
    logs = [(root / "metrics.jsonl").read_text().splitlines() for root in (folder / f"run-{kind}", one)]
    rows = [[(row["kind"], row["stage"], row["step"]) for row in map(json.loads, log)] for log in logs]
    assert rows[0] == rows[1]
    states = sorted(path.name for path in (folder / f"run-{kind}" / "checkpoints").glob("step-*/rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    # Whole tensors, as one process writes them.
    saved = [sorted((root / "checkpoints").glob("step-*/*"))[0].parent for root in (folder / f"run-{kind}", one)]
    tensors = [load_file(path / "model.safetensors") for path in saved]
    assert {k: v.shape for k, v in tensors[0].items()} == {k: v.shape for k, v in tensors[1].items()}


@pytest.mark.dear
@pytest.mark.parametrize("kind", KINDS)
def test_several_feeds(kind, folder):
    want = folder / "feeds-alone"
    if not want.exists():
        run(load_recipe(feeds_for(folder, 8)), want)
    assert_same_run(folder / f"feeds-{kind}", want, "stages/both/model", "stages/both/heads")


@pytest.mark.dear
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(kind, folder, one):
    """What one kind has saved, the other goes on with, and so does one process alone."""
    assert_same_run(folder / f"killed-{kind}", one)
    run(load_recipe(recipe_for(folder, 4)), folder / f"killed-{kind}-alone", resume=True)
    assert_same_run(folder / f"killed-{kind}-alone", one)


@pytest.mark.dear
def test_one_killed_process_ends_the_others(files, one):
    """Asked for by accelerate's environment; a checkpoint is left, with which one process goes on."""
    done = launch(files, "killed", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert done.returncode != 0 and "exitcode  : 9" in done.stderr
    assert (files / "killed" / "checkpoints" / "step-6").is_dir()
    run(load_recipe(recipe_for(files, 4)), files / "killed", resume=True)
    assert_same_run(files / "killed", one)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "add --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "shard with --use_fsdp --fsdp_version 2"),
    ],
)
def test_what_is_not_done_is_one_line(environment, said):
    with pytest.raises(UserError, match=said) as caught:
        ranks.refuse_environment(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("begun", "now", "batch", "accumulation"), [(2, 2, 6, 3), (1, 2, 3, 3), (2, 1, 6, 6), (4, 3, 4, 6), (1, 4, None, 0)]
)
def test_a_step_keeps_its_rows(begun, now, batch, accumulation):
    config = TrainConfig(batch_size=6, gradient_accumulation=3)
    if batch is None:
        with pytest.raises(UserError, match=r"4 cannot share the 6 rows of a batch; go on with 1, 2, 3, 6"):
            shared_out(config, begun, now)
        return
    new = shared_out(config, begun, now)
    assert (new.batch_size, new.gradient_accumulation) == (batch, accumulation)
    assert new.batch_size * new.gradient_accumulation * now == 6 * 3 * begun


if __name__ == "__main__":
    if sys.argv[2:] == ["killed"]:
        with killing(1):
            run(load_recipe(recipe_for(Path(sys.argv[1]), 4)), Path(sys.argv[1]) / "killed")
    else:
        work(Path(sys.argv[1]))
