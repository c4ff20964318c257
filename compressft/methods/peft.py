"""Any method of the `peft` package that changes linear layers (LoRA, DoRA, IA3, ...), so that passes run alongside."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from compressft.anatomy import anatomy
from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.model import compress_linear, head_parameters, replace
from compressft.modules.linear import CompressedLinear
from compressft.modules.tuner import PeftTuner, inject, peft_config, plain
from compressft.transform import Context, Transform


class Peft(Transform):
    """PEFT's tuner layers on the frozen model's projections, trained with the head.

    The effective weight is quantise(gates * (W + delta)) with the tuner's delta, so that pruning and quantisation see
    what ships, and export merges without bringing a pruned weight back. What stays is the tuner's tensors beside the
    base.

    Fields: `config`: PEFT's own fields, such as {peft_type: LORA, r: 8, target_modules: [query, value]}; without
    `target_modules` PEFT's defaults for the family where it has some, else all projections of the layers, which
    "all-linear" stands for too.
    """

    type: Literal["peft"] = "peft"
    config: dict[str, Any] = Field(default_factory=lambda: {"peft_type": "LORA"})

    @model_validator(mode="after")
    def _one_type(self) -> Peft:
        if "peft_type" not in self.config:
            raise ValueError("config.peft_type is missing; give a type of the peft package, such as LORA")
        if self.config.get("modules_to_save"):
            raise ValueError("config.modules_to_save: the head is trained anyway; remove it")
        return self

    def prepare(self, model: nn.Module, context: Context) -> None:
        config = self._config(model)
        already = [path for path, module in model.named_modules() if isinstance(module, CompressedLinear)]
        head = [parameter for _, parameter in head_parameters(model)]
        for layer in anatomy(model).layers:
            for path in layer.linears:
                # A Conv1D has its weight the other way round.
                compress_linear(model, f"{layer.name}.{path}")
        Layers(top=0).prepare(model, context)
        try:
            tuners = inject(model, config, context.seed)
        except ValueError as error:
            raise UserError(f"method peft.config: {' '.join(str(error).split())}") from None
        values = plain(config)
        for path, tuner in tuners.items():
            base: Any = tuner.base_layer
            if not isinstance(base, CompressedLinear):
                raise UserError(
                    f"method peft.config.target_modules: {path} is no projection of a transformer layer "
                    f"({type(base).__name__}); target the projections"
                )
            replace(model, path, base)
            PeftTuner(tuner, values, path).attach(base)
        # PEFT freezes whatever is not its own.
        for parameter in head:
            parameter.requires_grad_(True)
        for path, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear) and module.delta is None and path not in already:
                replace(model, path, module.restore())

    def _config(self, model: nn.Module) -> Any:
        try:
            config = peft_config(self.config)
        except ImportError:
            raise UserError("method peft: wants the peft package: pip install compressft[peft]") from None
        except ValueError as error:
            raise UserError(f"method peft.config: {error}") from None
        if config.is_prompt_learning:
            raise UserError(
                f"method peft.config.peft_type: {self.config['peft_type']} adds no weights; use method prefix"
            )
        if config.peft_type.value == "ADALORA":
            raise UserError(
                "method peft.config.peft_type: ADALORA moves ranks in training, as only PEFT's own model can; use LORA"
            )
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        wanted = getattr(config, "target_modules", None)
        if wanted == "all-linear" or (wanted is None and model.config.model_type not in KNOWN):  # type: ignore[union-attr]
            # PEFT's own reading of it takes in poolers and heads.
            stacks = {x.name.rpartition(".")[0]: x.linears for x in anatomy(model).layers}
            named = (rf"{re.escape(root)}\.\d+\.({'|'.join(map(re.escape, paths))})" for root, paths in stacks.items())
            config.target_modules = "|".join(named)
        return config
