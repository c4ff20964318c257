"""Any method of the `peft` package that changes linear layers (LoRA, DoRA, IA3, ...), so that passes run alongside."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from compressft.errors import UserError
from compressft.methods.layers import Layers
from compressft.methods.places import linear_paths
from compressft.model.anatomy import anatomy
from compressft.model.surgery import compress_linear, head_parameters, replace
from compressft.modules.linear import CompressedLinear
from compressft.modules.pretrained import pretrained
from compressft.modules.tuner import PeftTuner, inject, kind_of, peft_config, plain
from compressft.transform import Context, Transform

if TYPE_CHECKING:
    from peft import PeftConfig

# Ways to start that leave the base's weights alone.
KEEP_THE_BASE = ("gaussian", "orthogonal")


class Peft(Transform):
    """PEFT's tuner layers on the frozen model's projections, trained with the head.

    The effective weight is quantise(gates * (W + delta)) with the tuner's delta, so that pruning and quantisation see
    what ships, and export merges without bringing a pruned weight back. What stays is the tuner's tensors next to the
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
        for field in ("alora_invocation_tokens", "target_parameters"):
            if self.config.get(field):
                raise ValueError(f"config.{field}: what it adapts is no weight of a linear layer; remove it")
        start = self.config.get("init_lora_weights", True)
        if not (isinstance(start, bool) or start in KEEP_THE_BASE):
            raise ValueError(
                f"config.init_lora_weights: {start!r} rewrites the base's weights or reads data, and the base is "
                f"shared and shipped as it is; take true, false, {' or '.join(KEEP_THE_BASE)}"
            )
        return self

    def prepare(self, model: nn.Module, context: Context) -> None:
        config = self._config(model)
        already = [path for path, module in model.named_modules() if isinstance(module, CompressedLinear)]
        head = dict(head_parameters(model))
        # PEFT's own patterns for BERT take in its pooler's "dense".
        places = [f"{layer.name}.{path}" for layer in anatomy(model).layers for path in layer.linears]
        for path in [*places, *linear_paths(model, ("pooler",))]:
            # A Conv1D has its weight the other way round.
            compress_linear(model, path)
        Layers(top=0).prepare(model, context)
        try:
            with warnings.catch_warnings():
                # That a bias cannot be merged: it is refused below.
                warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
                tuners = inject(model, config, context.seed)
        except Exception as error:
            # PEFT has no errors of its own: a wrong type ends wherever it is first used.
            raise UserError(f"method peft.config: {' '.join(str(error).split()) or type(error).__name__}") from None
        values = plain(config)
        for path, tuner in tuners.items():
            base = tuner.base_layer
            if not isinstance(base, CompressedLinear):
                raise UserError(
                    f"method peft.config.target_modules: {path} is no projection of a transformer layer "
                    f"({type(base).__name__}); target the projections"
                )
            replace(model, path, base)
            PeftTuner(tuner, values, path).attach(base)
        # One speaks for all: they differ in shape alone.
        _check(model.get_submodule(next(iter(tuners))), kind_of(config))
        # PEFT freezes whatever is not its own.
        for name, parameter in head.items():
            parameter.requires_grad_(name.rpartition(".")[0] not in tuners)
        for path, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear) and module.delta is None and path not in already:
                replace(model, path, module.restore())

    def _config(self, model: nn.Module) -> PeftConfig:
        try:
            # Saved configurations say that they are for inference.
            config = peft_config({name: value for name, value in self.config.items() if name != "inference_mode"})
        except ImportError:
            raise UserError("method peft: wants the peft package: pip install compressft[peft]") from None
        except Exception as error:
            raise UserError(f"method peft.config: {error or type(error).__name__}") from None
        if config.is_prompt_learning:
            raise UserError(
                f"method peft.config.peft_type: {self.config['peft_type']} adds no weights; use method prefix"
            )
        if kind_of(config) == "ADALORA":
            raise UserError(
                "method peft.config.peft_type: ADALORA moves ranks in training, as only PEFT's own model can; use LORA"
            )
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

        wanted = getattr(config, "target_modules", None)
        if wanted == "all-linear" or (wanted is None and pretrained(model).config.model_type not in KNOWN):
            # PEFT's own reading of it takes in poolers and heads.
            stacks = {x.name.rpartition(".")[0]: x.linears for x in anatomy(model).layers}
            named = (rf"{re.escape(root)}\.\d+\.({'|'.join(map(re.escape, paths))})" for root, paths in stacks.items())
            # A field of some types of configuration.
            setattr(config, "target_modules", "|".join(named))  # noqa: B010
        return config


def _check(linear: nn.Module, kind: str) -> None:
    """Refuse a tuner that no weight and bias can hold.

    Raises:
        UserError: it is not affine in its input, or gives a bias to a layer that has none.
    """
    assert isinstance(linear, CompressedLinear) and isinstance(linear.delta, PeftTuner)
    if linear.weight.is_meta:
        # A model without values is there to be counted.
        return
    affine, biased = linear.delta.probe()
    if not affine:
        raise UserError(
            f"method peft.config.peft_type: {kind} with these fields is no change of a weight, which is what passes "
            "and export work on; take another type, such as LORA"
        )
    if biased and linear.bias is None:
        raise UserError(
            f"method peft.config: {kind} with these fields adds a bias to layers that have none, and the model's files "
            "have no place for it; leave the bias out (lora_bias: false)"
        )
