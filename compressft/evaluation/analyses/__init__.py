"""Analyses: what is found out about finished models. One file and one row here adds one."""

from compressft.evaluation.analyses.analysis import Analysis
from compressft.evaluation.analyses.closeness import Closeness

ANALYSES: dict[str, type[Analysis]] = {"closeness": Closeness}
