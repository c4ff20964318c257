"""Passes: what gets smaller. One file and one row here adds one."""

from compressft.passes.int8 import Int8
from compressft.passes.structured import Structured
from compressft.passes.vocabulary import Vocabulary
from compressft.transform import Transform

PASSES: dict[str, type[Transform]] = {
    "structured": Structured,
    "int8": Int8,
    "vocabulary": Vocabulary,
}
