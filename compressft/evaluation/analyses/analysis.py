"""What an analysis is: something found out about finished models, which it does not change."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from compressft.utils.strict import Strict

# The name of a recipe's model.
BASE = "base"
Value = str | float | int | None


@dataclass(frozen=True)
class Subjects:
    """The models that an analysis looks at, in the order in which it names them.

    Attributes:
        names: as the recipe or the command line says them.
        load: loads one by its name, on the CPU, in eval mode; the caller lets go of it.
        base: the base's tensors by the names that they have in the other models, where its name is "base": without a
            head that it was not saved with, which loading draws at random.
    """

    names: tuple[str, ...]
    load: Callable[[str], nn.Module]
    base: Callable[[], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True)
class Finding:
    """What was found: a sentence, and a table of which the first column is text.

    Attributes:
        summary: plain figures by name, for whoever reads report.json.
    """

    title: str
    sentence: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    summary: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def row(self, analysis: Analysis) -> dict[str, object]:
        """As it stands in report.json."""
        return {"type": analysis.type, "models": list(analysis.models), **vars(self)}


class Analysis(Strict):
    """Base of every analysis: its fields are what a recipe may set.

    `models` are names of stages, "base" for the recipe's model, folders or hub ids.
    """

    type: str
    models: tuple[str, ...] = Field(min_length=1)
    # How many models it compares: the least and the most.
    wants: ClassVar[tuple[int, int]] = (1, 2**31)

    @abstractmethod
    def find(self, subjects: Subjects) -> Finding:
        """Look at the models. UserError where they do not go together."""

    def refuse(self) -> str | None:
        """Why this cannot be asked of as many models, or None."""
        least, most = self.wants
        if least <= len(self.models) <= most:
            return None
        number = f"{least}" if least == most else f"at least {least}"
        return f"analysis {self.type!r} compares {number} models; got {len(self.models)}: {', '.join(self.models)}"
