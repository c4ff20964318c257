"""Data: files, hub data sets and shipped samples become rows, rows become task batches."""

from compressft.data.splits import Splits, load_splits
from compressft.data.tasks import TASKS, Task, make_task

__all__ = ["TASKS", "Splits", "Task", "load_splits", "make_task"]
