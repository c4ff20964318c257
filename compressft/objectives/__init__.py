"""Objectives: what is minimised besides the task's loss. One file and one row here adds one."""

from compressft.objectives.distill import Distill
from compressft.transform import Transform

OBJECTIVES: dict[str, type[Transform]] = {
    "distill": Distill,
}
