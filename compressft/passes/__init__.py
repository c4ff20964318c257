"""Passes: what gets smaller. One file and one row here adds one."""

from compressft.passes.block import Block
from compressft.passes.depth import Depth
from compressft.passes.int4 import Int4
from compressft.passes.int8 import Int8
from compressft.passes.l0 import L0
from compressft.passes.magnitude import Magnitude
from compressft.passes.movement import Movement
from compressft.passes.n_m import NM
from compressft.passes.nf4 import Nf4
from compressft.passes.sparsegpt import SparseGPT
from compressft.passes.structured import Structured
from compressft.passes.vocabulary import Vocabulary
from compressft.passes.wanda import Wanda
from compressft.passes.ziplm import ZipLM
from compressft.transform import Transform

PASSES: dict[str, type[Transform]] = {
    "structured": Structured,
    "ziplm": ZipLM,
    "int8": Int8,
    "int4": Int4,
    "nf4": Nf4,
    "vocabulary": Vocabulary,
    "depth": Depth,
    "magnitude": Magnitude,
    "movement": Movement,
    "l0": L0,
    "block": Block,
    "n_m": NM,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}
