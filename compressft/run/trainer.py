"""A thin subclass of transformers.Trainer that calls the Transforms; evaluation, resume and logging are its."""

from __future__ import annotations

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from compressft.errors import UserError
from compressft.evaluation.scores import Scores
from compressft.model.anatomy import anatomy
from compressft.model.finite import broken_term, refuse_update
from compressft.modules.kinds import Extra
from compressft.recipe.parts import TrainConfig
from compressft.run.feed import LengthGroupedSampler, training_lengths, training_rows
from compressft.run.mixed import Dealt, Joined, MixedBatches, Side, collate_by
from compressft.run.shards import Shards
from compressft.run.step import Step
from compressft.run.stream import Stream
from compressft.run.track import Ends, Tracking, flat
from compressft.tasks.encode import longest_first
from compressft.tasks.task import Feature, Task
from compressft.transform import Context, Transform, ungrouped, without_labels
from compressft.utils import ranks
from compressft.utils.memory import trim
from compressft.utils.phases import phase
from compressft.utils.precision import autocast_dtype


class Hooks(TrainerCallback):
    """Calls `after_step` of every Transform: once at the start, then after each optimiser step.

    What Transforms draw or decide there is the same in all processes.
    """

    def __init__(self, trainer: CompressionTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._follow(model, args, state, state.global_step)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        # The Trainer counts the step after this call; gradients are still there now.
        self._follow(model, args, state, state.global_step + 1)

    def _follow(self, model: Any, args: Any, state: Any, step: int) -> None:
        transforms = self.trainer.transforms
        looks = any(one.looks and type(one).after_step is not Transform.after_step for one in transforms)
        with ranks.same_draws(args.seed * 1_000_003 + step), self.trainer.whole(looks):
            for transform in transforms:
                transform.after_step(model, step / max(state.max_steps, 1))


class Trims(TrainerCallback):
    """Gives free memory back after steps 1, 2, 4, 8, ...: gradients and moments first come to lie between activations.

    Later steps find the heap as they leave it, and keep what they free.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step & (state.global_step - 1) == 0:
            trim()


@dataclass(frozen=True)
class Lesson:
    """What a stage trains on and how: features without padding, `labels` as the task has them.

    Attributes:
        rows: neighbours in length that are in one batch, over all processes and accumulated ones; 0 for as many as the
            processes take at once.
    """

    task: Task
    config: TrainConfig
    train: Sequence[Feature] | Stream
    validation: Sequence[Feature]
    sides: Sequence[Side] = ()
    rows: int = 0
    tracking: Tracking = field(default_factory=Tracking)


class CompressionTrainer(Trainer):
    """transformers.Trainer with the Transforms' loss terms, parameter groups and hooks.

    In a run of several processes each takes `batch_size` rows of every step, and the gradient is the mean of theirs:
    what one process has on a batch so many times as large, where its loss is a mean over rows. Means over tokens are
    means of the processes' means, as with gradient accumulation. At an epoch's end rows are taken twice where they do
    not come out even. Weights, masks and ranges are the same in all processes throughout.
    """

    def __init__(
        self,
        model: nn.Module,
        lesson: Lesson,
        context: Context,
        output: Path,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        task, config, sides = lesson.task, lesson.config, lesson.sides
        self.task = task
        self.context = context
        self.sides = list(sides)
        train = lesson.train
        rows: Any = train if isinstance(train, Stream) else training_rows(train, task, config.seed)
        self.transforms = list(context.transforms)
        self.terms: dict[str, float] = defaultdict(float)
        self.tokens = 0
        self.examples = 0
        self.rows = lesson.rows or config.batch_size * ranks.count()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.autocast_dtype = autocast_dtype(config.precision, device)
        args = training_arguments(config, output, device, self.autocast_dtype, lesson.tracking)
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=task.collate,
            train_dataset=Joined([rows, *(side.rows for side in sides)]) if sides else rows,  # type: ignore[arg-type]
            # Rows of one length together are evaluated with hardly any padding; what does not fit shows at once.
            eval_dataset=longest_first(lesson.validation, task),  # type: ignore[arg-type]
            callbacks=[Hooks(self), Trims(), Ends(), *callbacks],
        )
        lesson.tracking.settle(self.callback_handler.callbacks)
        self.remove_callback(PrinterCallback)
        self.step = Step(model, task, sides, context)
        self.shards: Shards | None = None
        if ranks.count() > 1:
            ranks.alike(model)
            # Autocast alone: what is wrapped around the step comes with training.
            self.accelerator.prepare_model(model, evaluation_mode=True)
            # Dropout of its own for every process.
            torch.manual_seed(self.args.seed + ranks.number())
        # The loss below is a mean over the batch; the Trainer divides it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        """bf16 autocast around student and teacher alike, without wrapping the model's forward."""
        if self.autocast_dtype is not torch.bfloat16:
            return super().autocast_smart_context_manager(cache_enabled)
        return torch.autocast(self.args.device.type, dtype=torch.bfloat16, cache_enabled=bool(cache_enabled))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Task loss times the objectives' factors, plus their terms; outside training the task loss alone."""
        if not model.training:
            outputs = model(**self.task.asked(inputs))
            loss = self.task.loss(outputs, inputs)
        else:
            # What wraps the model for several processes is around the whole step.
            loss = model(inputs) if ranks.count() > 1 else self.step(inputs, model)
            outputs = None
            if not math.isfinite(loss.item()):
                self._refuse_loss(self.step.model, self.step.terms, loss.item())
            for name, term in self.step.terms.items():
                self.terms[name] += float(term.detach())
            self.step.terms = {}
            self.terms["steps"] += 1
            self.tokens += int(inputs["attention_mask"].sum())
            self.examples += len(inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _refuse_loss(self, model: nn.Module, terms: Mapping[str, Tensor], value: float) -> NoReturn:
        """Say what is not finite: a weight since the last update, one term, or their sum."""
        step, rate = self.state.global_step, self.args.learning_rate
        refuse_update(model, step, rate, self.args.weight_decay)
        name, value = broken_term(terms) or ("sum", value)
        raise UserError(
            f"train: the loss ({name}) became {value} at step {step + 1}, all weights being finite; lower "
            f"train.learning_rate (now {rate:g}) or set train.precision to fp32"
        )

    def whole(self, wanted: bool = True) -> AbstractContextManager[None]:
        """Inside, the model's parameters are whole, where they are in pieces."""
        return self.shards.whole() if self.shards and wanted else nullcontext()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; the model is an ordinary one afterwards."""
        found = super().train(*args, **kwargs)
        if self.shards:
            self.shards.gather()
            self.shards = None
        return found

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; with the last batch of a step, what is in no pieces gets the mean of the gradients too."""
        loss = super().training_step(*args, **kwargs)
        if self.shards and self.accelerator.sync_gradients:
            self.shards.average_uncut()
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Every process comes by here, and one writes.
        super()._save(output_dir, self.shards.weights(self.step.model) if self.shards else state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.shards is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = self.shards.moments()
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.shards:
            self.shards.cut_moments()

    @phase("saving")
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with _python_files():
            super()._save_checkpoint(*args, **kwargs)

    @phase("evaluation")
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and metrics of the validation rows, of which several processes take turns; no batch is kept.

        It draws no random number: a checkpoint of the same step may be written before it.
        """
        trim()
        with torch.random.fork_rng(devices=[]), self.whole():
            found = {f"eval_{name}": value for name, value in self._evaluated().items()}
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    @torch.no_grad()
    def _evaluated(self) -> dict[str, float]:
        self.model.eval()  # type: ignore[union-attr]
        rows: Any = self.eval_dataset
        size, scores, lost, seen = self.args.per_device_eval_batch_size, Scores(self.task), 0.0, 0
        starts = range(0, len(rows), size)[ranks.number() :: ranks.count()]
        # Callbacks show how many batches there are.
        self.callback_handler.eval_dataloader = starts  # type: ignore[assignment]
        for start in starts:
            part = rows[start : start + size]
            lost, seen = lost + self._answer(part, scores) * len(part), seen + len(part)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        lost, seen = ranks.total(lost, seen)
        everybody = Scores(self.task)
        everybody.join(ranks.gathered(scores.kept))
        return {"loss": lost / seen, **everybody.metrics()}

    def _answer(self, rows: Sequence[Feature], scores: Scores) -> float:
        """The loss of a batch, whose answers are scored; nothing of it is left when the next one is computed."""
        task, plain = self.task, self.model
        batch: Any = self._prepare_inputs(task.collate(rows))  # type: ignore[arg-type]
        with self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(plain, batch, return_outputs=True)  # type: ignore[arg-type]
            answers = task.generate(plain, without_labels(batch)) if task.generates else outputs["logits"]
        scores.add(task.by_row(answers, len(rows)), task.truth(rows))
        return float(loss)

    def restore(self, checkpoint: Path) -> None:
        """Take over a checkpoint of the last step and evaluate it; the Trainer's resume would train one step more."""
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._load_from_checkpoint(str(checkpoint), self.model)
        for transform in self.transforms:
            transform.after_step(self.model, 1.0)  # type: ignore[arg-type]
        self.evaluate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; trackers are told the loss's terms too, and how far the Transforms are."""
        if "loss" in logs and self.args.report_to:
            logs = {**logs, **flat(self.mean_terms(), self.status())}
        super().log(logs, start_time)

    def status(self) -> dict[str, Any]:
        """What the Transforms have reached and head for, by type: {"int8": {"bits": {"now": 8, "target": 8}}}."""
        progress = self.state.global_step / self.state.max_steps
        with self.whole():
            found = {one.type: one.status(self.model, progress) for one in self.transforms}  # type: ignore[arg-type]
        return {name: values for name, values in found.items() if values}

    def mean_terms(self) -> dict[str, float]:
        """Mean of each loss term since `drain_terms`, over all processes."""
        sums = {name: value for name, value in self.terms.items() if name != "steps"}
        steps = self.terms.get("steps", 0) * ranks.count()
        return {name: value / steps for name, value in zip(sums, ranks.total(*sums.values()), strict=True)}

    def drain_terms(self) -> dict[str, float]:
        """`mean_terms`, which begin anew."""
        means = self.mean_terms()
        self.terms.clear()
        return means

    def all_examples(self) -> int:
        """Rows trained on so far, by all processes; an epoch's last batch may be a short one."""
        return int(ranks.total(self.examples)[0])

    def all_tokens(self) -> int:
        """Real tokens trained on so far, by all processes."""
        return int(ranks.total(self.tokens)[0])

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """In a run of several processes the whole step is wrapped, not the model alone."""
        if ranks.count() == 1 or not training:
            return super()._wrap_model(model, training, dataloader)
        if ranks.sharded():
            # What follows the layers' forward pass may read them.
            keep = any(type(one).loss is not Transform.loss for one in self.transforms)
            units = [layer.module for layer in anatomy(self.step.model).layers]
            optimizer: Any = self.optimizer
            self.shards = Shards(self.step, units, optimizer, keep)
            return self.step
        with warnings.catch_warnings():
            # accelerate's own: torch has another name for it since 2.13.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
            return self.accelerator.prepare_model(self.step)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the Transforms' own groups taken out of the common ones."""
        if self.optimizer is None:
            target: Any = self.model if model is None else model
            own = [group for t in self.transforms for group in t.param_groups(target, self.context)]
            super().create_optimizer(model)
            assert self.optimizer is not None
            optimizer: Any = self.optimizer
            for group in optimizer.param_groups:
                group["params"] = ungrouped(group["params"], own)
            for group in own:
                self.optimizer.add_param_group(group)
        return self.optimizer  # type: ignore[return-value]

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As transformers chooses them; what a method adds inside a norm, as Pfeiffer's adapters are, is no norm."""
        decayed = super().get_decay_parameter_names(model)
        for path, module in model.named_modules():
            if isinstance(module, Extra):
                decayed += [f"{path}.{name}" for name in super().get_decay_parameter_names(module)]
        return list(dict.fromkeys(decayed))

    def get_train_dataloader(self) -> DataLoader:
        """Batches of similar length, in an order that depends on seed and epoch alone."""
        features: Any = self.train_dataset
        batch_size = self.args.train_batch_size
        if self.sides:
            return self._mixed_dataloader(features, batch_size)
        if isinstance(features, Stream):
            return self.accelerator.prepare(DataLoader(features, batch_size=batch_size, collate_fn=self.data_collator))
        # Neighbouring batches are one step's: each process takes one of them, and then the next.
        rows = max(self.rows, batch_size)
        sampler = LengthGroupedSampler(training_lengths(features, self.task), rows, self.args.seed, features)
        loader = DataLoader(features, batch_size=batch_size, sampler=sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def _mixed_dataloader(self, joined: Joined, batch_size: int) -> DataLoader:
        """Batches of one feed each: what the processes take at once is of the same."""
        tasks = [self.task, *(side.task for side in self.sides)]
        rows = max(self.rows, batch_size)
        lengths = [training_lengths(part, task) for part, task in zip(joined.parts, tasks, strict=True)]
        samplers = [
            LengthGroupedSampler(length, rows, self.args.seed, part)
            for length, part in zip(lengths, joined.parts, strict=True)
        ]
        counts = [math.ceil(len(lengths[0]) / rows), *(side.batches for side in self.sides)]
        collate = collate_by(tasks)
        batches: Any = MixedBatches(samplers, counts, rows, self.args.seed)
        if rows > batch_size:
            batches = Dealt(batches, rows // batch_size)
        return self.accelerator.prepare(DataLoader(joined, batch_sampler=batches, collate_fn=collate))


@contextmanager
def _python_files() -> Iterator[None]:
    """Inside, `torch.save` writes through Python, which says why a write fails; its own writer forgets the reason."""
    save = torch.save

    def through_python(value: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(target, str | os.PathLike):
            return save(value, target, *args, **kwargs)
        with open(target, "wb") as file:
            save(value, file, *args, **kwargs)

    torch.save = through_python
    try:
        yield
    finally:
        torch.save = save


def training_arguments(
    config: TrainConfig, output: Path, device: str, dtype: torch.dtype | None, tracking: Tracking
) -> TrainingArguments:
    """Translate a recipe's train part; checkpoints go below `output`, everything is logged through our callbacks."""
    every = config.save if isinstance(config.save, int) else 500
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        lr_scheduler_type=config.scheduler,
        optim=config.optimizer,
        max_grad_norm=config.max_grad_norm,
        fp16=dtype is torch.float16,
        save_strategy="steps" if isinstance(config.save, int) else config.save,
        save_steps=every,
        eval_strategy="epoch",
        logging_steps=10 if not 0 < config.max_steps < 50 else 1,
        logging_nan_inf_filter=False,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=list(tracking.report_to),
        project=tracking.project,
        run_name=tracking.name,
        label_names=["labels"],
        # Gates rest, and heads of other feeds; what buffers hold is agreed on where it is measured.
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
    )
    # A process has one device: in torch.nn.DataParallel's copies, what buffers learn would be lost.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
