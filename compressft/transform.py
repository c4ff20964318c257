"""The one concept: a Transform rewrites a model before training, may follow training, and settles it afterwards."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

from compressft.errors import UserError
from compressft.utils.strict import Strict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from compressft.model.costs import CostTable
    from compressft.passes.shared.target import Target

TASK_LOSS = "task"


@dataclass
class TrainingData:
    """The stage's own training rows, for what is decided by looking at data before training.

    Attributes:
        tokenizer: the tokenizer in force; `retokenise` replaces it.
        features: encoded training rows: token ids without padding, `labels` as the task has them.
        collate: features -> padded batch.
        replace: encodes everything again with another tokenizer.
        max_length: tokens to which rows are cut, in all splits; None where only `features` are known.
        unlabelled: gives the encoded rows without labels that stages with a teacher train on besides.
        pieces: all token ids of an encoded row, those of further texts and of what is to be written too.
    """

    tokenizer: Any
    features: Sequence[dict[str, Any]]
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]
    replace: Callable[[Any], Sequence[dict[str, Any]]]
    max_length: int | None = None
    unlabelled: Callable[[], Sequence[dict[str, Any]]] = list
    pieces: Callable[[dict[str, Any]], Sequence[int]] = itemgetter("input_ids")

    @property
    def longest(self) -> int:
        """Tokens that a row may have."""
        return self.max_length or max(len(feature["input_ids"]) for feature in self.features)

    def batches(self, rows: int, size: int, seed: int) -> list[dict[str, torch.Tensor]]:
        """A calibration set: `rows` distinct training rows (all if there are fewer) in batches of `size`."""
        drawn = random.Random(seed).sample(range(len(self.features)), min(rows, len(self.features)))
        drawn.sort(key=lambda i: len(self.features[i]["input_ids"]))
        return [self.collate([self.features[i] for i in drawn[k : k + size]]) for k in range(0, len(drawn), size)]

    def retokenise(self, tokenizer: Any) -> None:
        """Go on with another tokenizer."""
        self.features = self.replace(tokenizer)
        self.tokenizer = tokenizer


@dataclass
class Context:
    """What a Transform may know of the run withs the model.

    Attributes:
        transforms: all Transforms of the stage, the method first.
        teachers: finished earlier stages by name, dense models in eval mode.
        load_teacher: loads a model from a folder or hub id, ready for this task.
        seed: the stage's seed; a Transform that draws numbers makes its own generator from it.
        data: the stage's training rows; None where a model is prepared without data.
        memo: `memo(key, compute)` is compute(), a JSON value, or what it gave when this run directory first asked. For
            what a resumed run must not measure again.
        fit_teacher: calls on every loaded teacher, so that it takes the batches the student takes.
        folder: where large values that a resumed run must not compute again may be kept; None outside a run directory.
        opened: what Transforms keep open during the stage (files), by a key of their own.
        base: per-layer shapes of the recipe's uncompressed model, as `shrink.shapes` gives them; None: as it is now.
        ships: arithmetic of the model that the recipe ends with: "fp32" or the quantising pass's type.
        latency: (target, arithmetic) -> what parts of the recipe's model cost on this machine; None where nothing can
            be measured.
        whole: (target, arithmetic, shapes) -> milliseconds of a whole model of these shapes on this machine, likewise.
    """

    transforms: Sequence[Transform] = ()
    teachers: dict[str, nn.Module] = field(default_factory=dict)
    load_teacher: Any = None
    seed: int = 0
    data: TrainingData | None = None
    memo: Callable[[str, Callable[[], Any]], Any] = lambda key, compute: compute()
    fit_teacher: list[Callable[[nn.Module], None]] = field(default_factory=list)
    folder: Path | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    base: Sequence[Mapping[str, int]] | None = None
    ships: str = "fp32"
    latency: Callable[[Target, str], CostTable] | None = None
    whole: Callable[[Target, str, Sequence[Mapping[str, int]]], float] | None = None

    def teacher(self, name: str) -> nn.Module:
        """A teacher by name, frozen, in eval mode, loaded once."""
        if name not in self.teachers:
            model = self.load_teacher(name)
            for fit in self.fit_teacher:
                fit(model)
            self.teachers[name] = model.requires_grad_(False).eval()
        return self.teachers[name]

    def calibration(self, rows: int, who: str) -> list[dict[str, torch.Tensor]]:
        """A calibration set of training rows in batches of 32.

        Raises:
            UserError: there is no data here.
        """
        if self.data is None:
            raise UserError(f"{who}: needs training rows to look at; run it in a recipe's stage")
        return self.data.batches(rows, 32, self.seed)


REMOVES, METHOD, OBJECTIVE, WEIGHTS, PARTS, QUANTISES = range(-10, 50, 10)


class Resource(Enum):
    """What Transforms of one stage may contend for; each completes "both decide"."""

    # As `order` REMOVES leaves them.
    STARTING_LAYERS = "which of the model's layers training begins with"
    STARTING_SHAPES = "how many heads and neurons training begins with"
    # Of the projections that the model comes with, from the first step on.
    VALUES = "what values the model's weights have"
    STORE = "in which form frozen weights are stored"
    SINGLE_WEIGHTS = "which single weights live"
    SCORES = "from one gradient which weights to leave out"
    COLUMNS = "which input columns the projections have"
    HEADS = "which attention heads live"
    NEURONS = "which FFN neurons live"
    LAYERS = "which layers live"
    HIDDEN = "which hidden dimensions live"
    ARITHMETIC = "in which arithmetic a layer computes"
    ATTENTION = "how queries and keys become attention"
    # Of layers that are frozen.
    FEATURES = "what the layers give for an example"
    # Hidden states and attention of each layer.
    INSIDE = "what the forward pass shows of its layers"


@dataclass(frozen=True)
class Claim:
    """That a Transform decides or changes a resource.

    Attributes:
        reason: what it does, as it follows on the Transform's name: "removes layers".
        field: the field that says so; empty where it always does.
        fix: what would do instead of leaving the Transform out; empty where nothing would.
    """

    resource: Resource
    reason: str
    field: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Want(Claim):
    """That a Transform needs a resource: as it is, or (`given`) one of the stage must tell it (`Transform.gives`)."""

    given: bool = False


class Transform(Strict):
    """Base of every method, objective and pass: its own configuration (the fields a recipe may set) plus hooks.

    What can run beside it follows from what it declares: `takes`, `changes`, `wants` and `gives`.

    Instances are frozen: all tensor state lives in the model as parameters and buffers, so the checkpoint is the state
    dict. `after_step` is also called once before the first step (with the starting progress and no gradients), which
    makes everything that depends on progress right after a resume.
    """

    type: str
    needs_hidden_states: ClassVar[bool] = False
    # Whether it says what rows without labels should give.
    answers: ClassVar[bool] = False
    # Whether `after_step` looks at parameters or their gradients: they are gathered for it where each process holds a
    # piece of them.
    looks: ClassVar[bool] = True
    # Whether the model that it leaves behind can be written as an ONNX file.
    exports: ClassVar[bool] = True
    # Transforms are prepared, followed and finalised in ascending order: what removes parts before training, the
    # method, what looks at activations, what gates single weights, what gates parts, what quantises.
    order: ClassVar[int] = METHOD
    # Resources that it can tell others of; STARTING_LAYERS by `kept`.
    gives: ClassVar[Sequence[Resource]] = ()

    def prepare(self, model: nn.Module, context: Context) -> None:
        """Rewrite the model before training. Raises UserError where the model lacks what this needs."""

    def param_groups(self, model: nn.Module, context: Context) -> list[dict[str, object]]:
        """Optimiser groups (`params`, `lr`, ...) for parameters that must not take the stage's settings."""
        return []

    def loss(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], outputs: Any, context: Context
    ) -> dict[str, torch.Tensor]:
        """Further loss terms by name, already weighted; scalars."""
        return {}

    def after_step(self, model: nn.Module, progress: float) -> None:
        """Follow training: called after each optimiser step, gradients still there. `progress` is in [0, 1]."""

    def finalize(self, model: nn.Module) -> None:
        """Settle the model after training: from here on it is what ships."""

    def unfold(self, model: nn.Module, base: nn.Module) -> bool:
        """Undo `finalize` on a model loaded with its `base`, where that holds more as the base's own; whether it did.

        It computes the same afterwards, and `finalize` settles it again.
        """
        return False

    def task_weight(self, model: nn.Module) -> float:
        """Factor on the task's own loss now; the factors of all objectives multiply."""
        return 1.0

    def inputs(self) -> Sequence[str]:
        """Files, folders and hub ids that it reads besides the recipe's model and data; earlier stages may be named."""
        return ()

    def kept(self, depth: int, context: Context) -> Sequence[int]:
        """Indices of the layers, of `depth`, that training begins with."""
        return range(depth)

    def check(self) -> str | None:
        """Why its own fields contradict each other (with the fix), or None."""
        return None

    def takes(self) -> Sequence[Claim]:
        """What it decides alone: nobody else may decide or change it."""
        return ()

    def changes(self) -> Sequence[Claim]:
        """What it changes, as others may too; by default what its `order` says."""
        found = []
        if self.order == REMOVES:
            found.append(Claim(Resource.STARTING_LAYERS, "removes layers before training"))
            found.append(Claim(Resource.STARTING_SHAPES, "cuts the layers before training"))
        if self.order == PARTS:
            found.append(Claim(Resource.COLUMNS, "removes input columns"))
        if self.order >= WEIGHTS:
            found.append(Claim(Resource.FEATURES, "changes what the layers give"))
        return found

    def alters(self) -> Sequence[Claim]:
        """What it takes or changes: what is not as it was for others."""
        return (*self.takes(), *self.changes())

    def wants(self) -> Sequence[Want]:
        """What nobody else may take or change, or what another must give."""
        return ()

    def status(self, model: nn.Module, progress: float) -> dict[str, dict[str, float]]:
        """What the progress display shows: {quantity: {"now", "planned", "target"}}."""
        return {}


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch, or a row, without what it should be answered with."""
    return {name: value for name, value in batch.items() if name != "labels"}


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that require a gradient."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def ungrouped(parameters: Iterable[nn.Parameter], groups: Sequence[Mapping[str, Any]]) -> list[nn.Parameter]:
    """Those that are in none of these optimiser groups."""
    taken = {id(parameter) for group in groups for parameter in group["params"]}
    return [parameter for parameter in parameters if id(parameter) not in taken]


def ramp(progress: float, start: float, end: float) -> float:
    """Fraction in [0, 1] of the way from `start` to `end`; a step at `end` where the two are equal."""
    if progress >= end:
        return 1.0
    if progress <= start:
        return 0.0
    return (progress - start) / (end - start)


def constant(fraction: float) -> float:
    """1 from the beginning of the ramp on."""
    return 1.0 if fraction > 0.0 else 0.0


def linear(fraction: float) -> float:
    """Identity."""
    return fraction


def cubic(fraction: float) -> float:
    """1 - (1 - t)^3: prune fast while much is redundant (Zhu & Gupta 2017, equation 1)."""
    return 1.0 - (1.0 - fraction) ** 3


def cosine(fraction: float) -> float:
    """Half a cosine from 0 to 1."""
    return 0.5 - 0.5 * math.cos(math.pi * fraction)


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "cosine": cosine,
}
