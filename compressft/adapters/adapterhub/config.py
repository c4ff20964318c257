"""What a bottleneck's configuration says in the `adapters` package, as fields of our method and back."""

from __future__ import annotations

from collections.abc import Mapping

from compressft.errors import UserError, nearest
from compressft.modules.bottleneck import BottleneckDesign
from compressft.utils.texts import JSON

# Names of activations there -> here; the first of several is the one that is written.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
}
INITS = {"bert": "bert", "houlsby": "houlsby", "mam_adapter": "zero"}
# Fields that decide what is computed: their defaults there.
MATTERS: dict[str, JSON] = {
    "mh_adapter": None,
    "output_adapter": None,
    "non_linearity": None,
    "reduction_factor": None,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
    "is_parallel": False,
    "scaling": 1.0,
    "inv_adapter": None,
}
# Fields that we have no part for: the only value that is read.
ABSENT: dict[str, JSON] = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "use_gating": False,
    "cross_adapter": False,
    "phm_layer": False,
    "leave_out": [],
}
# Fields that act in training or initialisation alone, or with one of the above.
IDLE = {
    "adapter_residual_before_ln",
    "dropout",
    "factorized_phm_W",
    "factorized_phm_rule",
    "hypercomplex_nonlinearity",
    "init_weights",
    "init_weights_seed",
    "inv_adapter_reduction_factor",
    "learn_phm",
    "phm_bias",
    "phm_c_init",
    "phm_dim",
    "phm_init_range",
    "phm_rank",
    "shared_W_phm",
    "shared_phm_rule",
    "stochastic_depth",
}


def fields_of(config: Mapping[str, JSON], post_norm: bool, who: str) -> dict[str, JSON]:
    """Fields of method adapter, without its size: {"placement", "activation", "scale", "init", "invertible"}.

    Args:
        config: the `config` object of an adapter_config.json there.
        post_norm: whether the model's LayerNorms come after its residual adds.

    Raises:
        UserError: a field that is not known, or whose value computes what our modules do not; with what is read.
    """
    known = {*MATTERS, *ABSENT, *IDLE}
    for name in config:
        if name not in known:
            raise UserError(f"{who}: unknown field config.{name}{nearest(name, known)}")
    for name, value in ABSENT.items():
        if (config.get(name) or value) != value or (value is True and config.get(name) is False):
            raise UserError(f"{who}: config.{name} {config[name]!r} is not read; {value!r} is")
    values = {**MATTERS, **config}
    for name in ("non_linearity", "mh_adapter", "output_adapter"):
        if values[name] is None:
            raise UserError(f"{who}: config.{name} is missing")
    activation = str(values["non_linearity"]).lower()
    if activation not in ACTIVATIONS:
        raise UserError(f"{who}: config.non_linearity {activation!r} is not read; {', '.join(ACTIVATIONS)} are")
    scaling = values["scaling"]
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or scaling <= 0:
        raise UserError(f"{who}: config.scaling {scaling!r} is not read; a positive number is")
    if values["inv_adapter"] not in (None, "nice"):
        raise UserError(f"{who}: config.inv_adapter {values['inv_adapter']!r} is not read; 'nice' and null are")
    if isinstance(values["reduction_factor"], Mapping):
        raise UserError(f"{who}: config.reduction_factor per layer is not read; one number for all layers is")
    return {
        "placement": _placement(values, post_norm, who),
        "activation": ACTIVATIONS[activation],
        "scale": float(scaling),
        "init": INITS.get(str(config.get("init_weights", "bert")), "bert"),
        "invertible": values["inv_adapter"] == "nice",
    }


def _placement(values: Mapping[str, JSON], post_norm: bool, who: str) -> str:
    both = bool(values["mh_adapter"]), bool(values["output_adapter"])
    if not both[1]:
        raise UserError(f"{who}: config.output_adapter false is not read; true is, with or without mh_adapter")
    before = bool(values["original_ln_before"])
    if values["is_parallel"]:
        if both[0] or not post_norm:
            what = (
                "mh_adapter true" if both[0] else "is_parallel true on a pre-norm model, where it reads past the norm"
            )
            raise UserError(
                f"{who}: config.{what} is not read; parallel adapters next to the FFN of post-norm models are"
            )
        return "parallel"
    if not post_norm and before:
        raise UserError(
            f"{who}: config.original_ln_before true is not read on a pre-norm model, where it adds the residual twice; "
            "false is"
        )
    if both[0]:
        if before:
            raise UserError(f"{who}: config.original_ln_before true next to mh_adapter is not read; false is")
        return "houlsby"
    if post_norm and (not before or values["residual_before_ln"] is not True):
        name = "original_ln_before" if not before else "residual_before_ln"
        raise UserError(f"{who}: config.{name} {values[name]!r} of an output_adapter alone is not read; true is")
    return "pfeiffer"


def config_of(
    placement: str, design: BottleneckDesign, post_norm: bool, inner: tuple[int, int] | None
) -> dict[str, JSON]:
    """The `config` object for a bottleneck of ours; the inverse of `fields_of`.

    Args:
        inner: width and size of the invertible adapter's networks, None where there is none.
    """
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    inits = {"houlsby": "houlsby", "pfeiffer": "bert", "parallel": "mam_adapter"}
    return {
        "mh_adapter": placement == "houlsby",
        "output_adapter": True,
        "reduction_factor": _factor(design.width, design.size),
        "non_linearity": names[design.activation],
        "original_ln_before": placement == "pfeiffer" and post_norm,
        "original_ln_after": True,
        "ln_before": False,
        "ln_after": False,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "is_parallel": placement == "parallel",
        "scaling": float(design.scale),
        "init_weights": inits[placement],
        "use_gating": False,
        "cross_adapter": False,
        "leave_out": [],
        "dropout": 0.0,
        "phm_layer": False,
        "inv_adapter": None if inner is None else "nice",
        "inv_adapter_reduction_factor": None if inner is None else _factor(*inner),
    }


def _factor(width: int, size: int) -> int | float:
    """A factor that `int(width // factor)` makes `size` of."""
    return width // size if width % size == 0 else width / (size + 0.5)
