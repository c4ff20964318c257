"""Models of transformers by their type, where a signature has them as modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.utils.generic import ModelOutput


class Generates(Protocol):
    """What is asked of a model that generates."""

    generation_config: GenerationConfig

    def generate(self, *args: object, **kwargs: object) -> Tensor | ModelOutput:
        """transformers' own."""
        ...


def pretrained(module: nn.Module) -> PreTrainedModel:
    """The same object, which must be a model of transformers, or the backbone of one; nothing is asked of it."""
    # To ask would be to import transformers.
    return cast("PreTrainedModel", module)


def generating(module: nn.Module) -> Generates:
    """The same object, which must be a model of transformers that generates; nothing is asked of it."""
    return cast("Generates", module)
