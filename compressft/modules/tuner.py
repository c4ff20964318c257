"""A layer of the `peft` package (LoRA, DoRA, IA3, ...) in the delta slot of a CompressedLinear."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from compressft.modules.kinds import Extra, built, known
from compressft.modules.low_rank import low_rank
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from peft import PeftConfig

    from compressft.modules.linear import CompressedLinear

ORIGIN = (
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "peft_version",
)


class BaseView(nn.Module):
    """What a tuner sees as its base layer: the linear without its delta, seen but not owned (no parameter of it)."""

    linear: CompressedLinear

    def __init__(self, linear: CompressedLinear) -> None:
        super().__init__()
        # Past nn.Module's registration, or the layer would contain itself.
        self.__dict__["linear"] = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.with_bias = True

    @property
    def weight(self) -> nn.Parameter:
        """(out, in); one that is stored packed is built again, frozen."""
        weight = self.linear.weight
        return weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        """(out,)."""
        return self.linear.bias if self.with_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.linear.base_product(x, self.bias)


@known
class PeftTuner(Extra):
    """One tuner layer. Next to gates and quantizers it gives its part of the weight, otherwise it computes its product.

    The part is read off the layer itself: its outputs for the unit vectors, less the base's weight. That holds for
    every tuner that is affine in its input; plain LoRA gives B A directly. LoRA's and DoRA's products are computed in
    fewer passes than PEFT makes (`modules.low_rank`). Dropout on the tuner's input acts where it computes the product,
    not where gates or quantizers need the weight.
    """

    kind: ClassVar[str] = "peft_tuner"

    def __init__(self, tuner: nn.Module, config: Mapping[str, JSON], path: str) -> None:
        super().__init__()
        self.tuner = tuner
        self.config = dict(config)
        self.path = path
        del tuner._modules["base_layer"]

    def attach(self, linear: CompressedLinear) -> None:
        """Take the place in the delta slot of `linear`."""
        self.tuner.__dict__["base_layer"] = BaseView(linear)
        linear.delta = self

    @property
    def base(self) -> BaseView:
        """The layer it stands in, as the tuner sees it."""
        return self.tuner.__dict__["base_layer"]

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), base and bias included."""
        product = low_rank(self.tuner, x)
        return self.tuner(x) if product is None else product(x)

    def forward(self) -> Tensor:
        """W_eff - W, (out, in), fp32."""
        lora = getattr(self.tuner, "lora_variant", None) == {} and hasattr(self.tuner, "get_delta_weight")
        if lora and not any(getattr(self.tuner, "lora_bias", {}).values()):
            parts = [self.tuner.get_delta_weight(name) for name in self.tuner.active_adapters]  # type: ignore[operator]
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        weight = self.base.weight
        unit = torch.eye(self.base.in_features, device=weight.device, dtype=weight.dtype)
        return self._at(unit, with_bias=False).t() - weight

    def bias(self) -> Tensor | None:
        """What is added to the product, (out,): the base's bias as the tuner changes it; None for none."""
        weight = self.base.weight
        zero = torch.zeros(1, self.base.in_features, device=weight.device, dtype=weight.dtype)
        changed = self._at(zero, with_bias=True)[0]
        return None if self.base.bias is None and not changed.any() else changed

    @torch.no_grad()
    def probe(self) -> tuple[bool, bool]:
        """Whether the product is affine in its input, and whether it has a bias next to the base's.

        Asked of a copy with values drawn for each of its parameters: most tuners start as no change at all.
        """
        view = self.base
        other = PeftTuner.__new__(PeftTuner)
        nn.Module.__init__(other)
        # The base is seen, not copied.
        other.tuner = copy.deepcopy(self.tuner, {id(view): view})
        generator = torch.Generator().manual_seed(0)
        for parameter in other.tuner.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.add_(drawn.to(parameter.device, parameter.dtype))
        weight = view.weight
        x = torch.randn(2, view.in_features, generator=generator).to(weight.device, weight.dtype)
        try:
            y = other._at(x, with_bias=True)
            zero = other._at(torch.zeros_like(x[:1]), with_bias=True)
            whole = other._at(x.sum(0, keepdim=True), with_bias=True) + zero
            folded = x @ (weight + other()).to(weight.dtype).t() + zero
        except (RuntimeError, ValueError, NotImplementedError):
            return False, False
        near = (1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.1) * float(y.abs().max())
        affine = all(float((a - b).abs().max()) <= near for a, b in ((whole, y.sum(0)), (folded, y)))
        return affine, bool((zero != (0 if view.bias is None else view.bias)).any())

    def _at(self, x: Tensor, with_bias: bool) -> Tensor:
        training = self.tuner.training
        self.base.with_bias = with_bias
        self.tuner.eval()
        try:
            with torch.autocast(x.device.type, enabled=False):
                y = self.tuner(x)
                # The constant part: a bias of the tuner's own is no column of the weight.
                return y if with_bias else y - self.tuner(torch.zeros_like(x[:1]))
        finally:
            self.base.with_bias = True
            self.tuner.train(training)

    def describe(self) -> dict[str, JSON]:
        """PEFT's configuration, the layer's path (patterns refer to it) and shape."""
        shape = {"inputs": self.base.in_features, "outputs": self.base.out_features, "bias": self.base.bias is not None}
        return {"config": self.config, "path": self.path, **shape}

    @classmethod
    def rebuild(cls, old: nn.Module | None, entry: Mapping[str, JSON]) -> PeftTuner:
        """Made by `peft` for a layer of the same path and shape; `attach` follows."""
        return built(cls._again, entry)

    @classmethod
    def _again(cls, config: dict[str, JSON], path: str, inputs: int, outputs: int, bias: bool) -> PeftTuner:
        linear = nn.Linear(inputs, outputs, bias=bias)
        root = nn.Module()
        owner = root
        *parents, name = path.split(".")
        for parent in parents:
            owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(name, linear)
        with warnings.catch_warnings():
            # That patterns name layers which are not here.
            warnings.simplefilter("ignore")
            inject(root, peft_config(config), seed=0)
        return cls(root.get_submodule(path), config, path)


def peft_config(values: Mapping[str, JSON]) -> PeftConfig:
    """PEFT's configuration object for {"peft_type": ..., field: value}.

    Raises:
        ValueError: an unknown type or field.
    """
    given = dict(values)
    kind = given.pop("peft_type")
    try:
        return _made(_config_class(kind), given)
    except TypeError as error:
        raise ValueError(f"{str(kind).upper()}: {error}") from None


def _made(make: Callable[..., PeftConfig], given: Mapping[str, JSON]) -> PeftConfig:
    return make(**given)


def peft_fields(kind: object) -> set[str]:
    """Names of the fields of a type's configuration.

    Raises:
        ValueError: an unknown type.
    """
    return {field.name for field in dataclasses.fields(_config_class(kind))}


def _config_class(kind: object) -> type[PeftConfig]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    name = str(kind).upper()
    types = {str(getattr(known, "value", known)): found for known, found in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in types:
        raise ValueError(f"peft_type {name!r} is not known to this peft; it knows {', '.join(sorted(types))}")
    return types[name]


def plain(config: PeftConfig) -> dict[str, JSON]:
    """What makes a PEFT configuration again: its type and the fields that are not at their defaults, JSON values."""
    kept = {"peft_type": kind_of(config)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        # How the tuner started says nothing about what it became; the others are about where it came from.
        if field.name.startswith("init_") or field.name in ORIGIN or value == made:
            continue
        kept[field.name] = value
    return json.loads(json.dumps(kept, default=lambda v: sorted(v) if isinstance(v, set) else vars(v)))


def kind_of(config: PeftConfig) -> str:
    """The name of a configuration's type, such as LORA."""
    from peft import PeftType

    assert isinstance(config.peft_type, PeftType)
    return str(config.peft_type.value)


def inject(model: nn.Module, config: PeftConfig, seed: int) -> dict[str, nn.Module]:
    """Let `peft` put its tuner layers into the model; those it made, by path. The global generators stay as they are.

    Raises:
        ValueError: as `peft` gives it.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}  # type: ignore[misc]
