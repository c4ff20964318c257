"""What a run tells while it works: a rich display on a terminal, plain lines elsewhere, and rows in metrics.jsonl."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import Progress
from transformers import TrainerCallback

from compressft.recipe.program import Stage
from compressft.run.records import Run
from compressft.tasks.task import Task
from compressft.utils import ranks
from compressft.utils.phases import PATIENCE, SECONDS, columns, keep, phase, telling_itself


class Reporter(TrainerCallback):
    """Shows and records loss, metric, sparsity and bit width (now and target); publishes checkpoints; heeds signals.

    Args:
        offset: steps of the stages before this one, so that steps are cumulative.
        spent: seconds this stage trained before a resume.
    """

    def __init__(self, run: Run, stage: Stage, task: Task, offset: int, spent: float) -> None:
        self.folder = run.folder
        self.console = run.console
        self.stage = stage.name
        self.keep = stage.train.keep_checkpoints
        self.batch = stage.train.batch_size
        self.task = task
        self.offset = offset
        self.spent = spent
        self.trainer: Any = None
        self.interrupted = False
        self.evaluations: list[dict[str, float]] = []
        self._start = time.perf_counter()
        self._progress: Progress | None = None
        self._line = 0.0
        self._evaluated = 0
        self._telling = ExitStack()
        self._previous: dict[int, Any] = {}
        self._text = ""

    @property
    def seconds(self) -> float:
        """Training time of this stage so far, resumed parts included."""
        return self.spent + time.perf_counter() - self._start

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()
        self._previous = _on_signals(self._stop)
        self._telling.enter_context(telling_itself())
        if self.console.is_terminal:
            self._progress = Progress(*columns(self.stage), console=self.console)
            self._bar = self._progress.add_task("", total=state.max_steps, completed=state.global_step)
            self._progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.update(self._bar, completed=state.global_step)
        # A signal may reach another process first.
        if any(ranks.total(self.interrupted)):
            self.interrupted = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.interrupted and state.global_step < state.max_steps:
            # The epoch is not over: it was saved at its step, and an evaluation would only delay the stop.
            control.should_save = control.should_evaluate = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        status = self.trainer.status()
        row = {
            "kind": "train",
            "stage": self.stage,
            "step": self.offset + state.global_step,
            "epoch": logs.get("epoch"),
            "progress": state.global_step / state.max_steps,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "terms": self.trainer.drain_terms(),
            "status": status,
        }
        self.folder.log(row)
        shown = "  ".join(
            f"{name} {_amount(name, v['now'])}→{_amount(name, v['target'])}"
            for values in status.values()
            for name, v in values.items()
        )
        self._text = f"loss {logs['loss']:.3f}  {shown}"
        self._show(state)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        self._evaluated += 1
        if self._progress is None and self._due():
            total = len(eval_dataloader) if eval_dataloader is not None else "?"
            self._say(f"{self.stage}: step {state.global_step}, evaluating: {self._evaluated}/{total}")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._evaluated = 0
        values = {k.removeprefix("eval_"): v for k, v in (metrics or {}).items()}
        others = ("runtime", "samples", "steps", "loss", "epoch", "model_preparation")
        wanted = ("loss", *(k for k in values if not k.startswith(others)))
        row = {name: float(values[name]) for name in wanted if name in values}
        self.evaluations.append(row)
        self.folder.log(
            {
                "kind": "eval",
                "stage": self.stage,
                "step": self.offset + state.global_step,
                "split": "validation",
                "metrics": row,
            }
        )
        if self.task.metric in row:
            self._say(
                f"{self.stage}: step {state.global_step}/{state.max_steps}, validation {self.task.metric} "
                f"{row[self.task.metric]:.4f}"
            )

    @phase("saving")
    def on_save(self, args, state, control, **kwargs):
        written = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        info = {
            "stage": self.stage,
            "stage_step": state.global_step,
            "done": state.global_step >= state.max_steps,
            "seconds": self.seconds,
            "tokens": self.trainer.all_tokens(),
            "examples": self.trainer.all_examples(),
            "processes": self.trainer.rows // self.batch,
        }
        # Each process has written its random state.
        ranks.wait()
        self.folder.publish(written, self.offset + state.global_step, info, self.keep)
        if ranks.first():
            keep(self.folder.root / SECONDS)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Stop the display and give the signals back; harmless when called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._telling.close()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.console.print("interrupted: saving after this step (again to stop at once)", highlight=False)

    def _show(self, state: Any) -> None:
        if self._progress is not None:
            self._progress.update(self._bar, description=self._text)
        elif self._due():
            left = (self.seconds - self.spent) / max(state.global_step, 1) * (state.max_steps - state.global_step)
            self._say(f"{self.stage}: step {state.global_step}/{state.max_steps}  {self._text}  ETA {left:.0f} s")

    def _due(self) -> bool:
        """Whether it is time for another line."""
        now = time.perf_counter()
        due = now - self._line > PATIENCE
        self._line = now if due else self._line
        return due

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _amount(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "bits" else f"{100 * value:.0f}%"


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for what stops a program, by hand or by a scheduler; the earlier ones by signal.

    None of them where this is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
