"""Adapter folders of the `peft` package: tuners of linear layers (LoRA, DoRA, IA3, ...), through the package itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compressft.adapters import peft_prefix
from compressft.adapters.files import CONFIG, TENSORS, read_json, read_metadata, read_tensors, write_tensors
from compressft.adapters.peft_model import modules_to_save, task_type, unsaveable
from compressft.adapters.settled import Settled, own_head, put, shared_copy
from compressft.errors import UserError
from compressft.methods.peft import KEEP_THE_BASE, Peft
from compressft.model.saved.state import layers_hash, plain_state
from compressft.modules.prefix import Prefix
from compressft.modules.tuner import ORIGIN, PeftTuner, kind_of, peft_config, peft_fields, plain
from compressft.transform import Context
from compressft.utils.texts import JSON

if TYPE_CHECKING:
    from peft import PeftConfig

BINARY = "adapter_model.bin"
# Starts after which the base is as it was.
LEAVE_THE_BASE = (*KEEP_THE_BASE, "eva")
# Where a tuner's tensors are in our models and in PEFT's, and where PEFT has its copies of the base's modules.
OURS, THEIRS, COPIES = ".delta.tuner.", "base_model.model.", ".modules_to_save.default"


def refusal(settled: Settled) -> str | None:
    """Why PEFT's format cannot hold this, or None."""
    found = settled.ours
    if any(isinstance(module, Prefix) for module in found.values()):
        return peft_prefix.refusal(settled)
    tuners = [module for module in found.values() if isinstance(module, PeftTuner)]
    if len(tuners) < len(found) or not tuners:
        other = next((type(m).__name__ for m in found.values() if not isinstance(m, PeftTuner)), "changed weights")
        what = f"method {settled.method.type}" if settled.method is not None and not tuners else other
        return f"PEFT's format has no place for {what}; it holds PEFT's own tuners and prefixes"
    if len({json.dumps(tuner.config, sort_keys=True) for tuner in tuners}) > 1:
        return "its tuners have different configurations, and PEFT's folder holds one"
    if tuners[0].config.get("bias", "none") != "none":
        return f"bias {tuners[0].config['bias']!r} also trains the base's biases, which is not read again"
    problem = unsaveable(settled, _of_tuners(settled))
    if problem is None:
        from peft import get_peft_model

        try:
            with _quiet(), torch.device("meta"):
                get_peft_model(shared_copy(settled.plain), peft_config(tuners[0].config))
        except (TypeError, ValueError) as error:
            # Many of its types do not take a Conv1D.
            problem = f"the peft package cannot put them on this model: {' '.join(str(error).split())}"
    return problem


def _of_tuners(settled: Settled) -> set[str]:
    return {name for name in settled.changed if OURS in name}


def note(settled: Settled) -> dict[str, str]:
    """What we keep besides PEFT's own fields, in the header of the tensors' file."""
    return {"layers_hash": layers_hash(settled.plain, settled.base)}


def write(settled: Settled, folder: Path) -> None:
    """Write the two files that `peft.PeftModel.save_pretrained` would; `refusal` must have had no objection."""
    if any(isinstance(module, Prefix) for module in settled.ours.values()):
        peft_prefix.write(settled, folder, note(settled))
        return
    from peft import get_peft_model, get_peft_model_state_dict

    tuner = next(module for module in settled.ours.values() if isinstance(module, PeftTuner))
    saved = modules_to_save(settled, _of_tuners(settled))
    config = peft_config(tuner.config)
    config.task_type = task_type(settled.plain)
    # A field of the tuners' configurations.
    setattr(config, "modules_to_save", saved or None)  # noqa: B010
    with _quiet():
        model = get_peft_model(shared_copy(settled.plain), config)
        state = {name.removeprefix(THEIRS).replace(COPIES, ""): tensor for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for name, tensor in settled.changed.items():
                state[name.replace(OURS, ".")].copy_(tensor)
        write_tensors(folder / TENSORS, get_peft_model_state_dict(model, save_embedding_layers=False), note(settled))
    config.base_model_name_or_path = str(getattr(settled.plain, "name_or_path", "") or "") or None
    config.inference_mode = True
    if config.task_type is None:
        home = type(settled.plain)
        config.auto_mapping = {"base_model_class": home.__name__, "parent_library": home.__module__}
    config.save_pretrained(str(folder))


def read(base: nn.Module, folder: Path) -> Settled:
    """A PEFT folder on a tree of this base's tensors, its tuners in the delta slots.

    Raises:
        UserError: `peft` is not installed; a type, field or tensor has no place here; we wrote it for another base.
    """
    values = read_json(folder / CONFIG)
    header = read_metadata(folder / TENSORS)
    noted = header.get("layers_hash")
    if noted is not None and noted != layers_hash(base, plain_state(base)[0]):
        raise UserError(
            f"{folder}: was made on another base than the model here (content hashes differ); "
            f"give {values.get('base_model_name_or_path') or 'the one it was trained on'}"
        )
    if str(values.get("peft_type")).upper() == "PREFIX_TUNING":
        tensors = read_tensors(folder, [TENSORS, BINARY])
        return peft_prefix.read(base, folder, values, tensors, header.get(peft_prefix.NUDGES, ""))
    config = _config(values, folder)
    tensors = _loaded(base, folder, config)
    # In our layers a weight lies the usual way round, and the head is trained anyway.
    left = ("modules_to_save", "fan_in_fan_out")
    method = Peft(config={name: value for name, value in plain(config).items() if name not in left})
    tree = shared_copy(base)
    method.prepare(tree, Context())
    put(tree, {}, tensors, str(folder))
    return Settled(tree.eval(), base, method, own_head(tree, base))


def _config(values: Mapping[str, JSON], folder: Path) -> PeftConfig:
    """PEFT's configuration object."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UserError(f"{folder}: reading it wants the peft package: pip install compressft[peft]") from None
    try:
        # Fields of other versions of PEFT matter where they are set.
        known = peft_fields(values.get("peft_type"))
        kept = {k: v for k, v in values.items() if k not in ORIGIN and (k in known or _is_set(v))}
        config = peft_config({**kept, "peft_type": values.get("peft_type")})
    except ValueError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    kind = kind_of(config)
    if config.is_prompt_learning or kind == "ADALORA":
        raise UserError(
            f"{folder / CONFIG}: peft_type {kind} is not read; PREFIX_TUNING is, and what changes linear layers alone "
            "(LORA, IA3, LOHA, ...)"
        )
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise UserError(f"{folder / CONFIG}: bias {bias!r} also trains the base's biases; 'none' is read")
    start = getattr(config, "init_lora_weights", True)
    if not (isinstance(start, bool) or start in LEAVE_THE_BASE):
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights {start!r} rewrites the base that it is put on; turn the adapter "
            "into a plain LoRA with peft (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    return config


def _is_set(value: object) -> bool:
    return value is not None and value != {} and value != []


def _loaded(base: nn.Module, folder: Path, config: PeftConfig) -> dict[str, Tensor]:
    """The folder's tensors under our names, loaded by PEFT into a model of its own."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    stored = read_tensors(folder, [TENSORS, BINARY])
    try:
        with _quiet():
            model = get_peft_model(shared_copy(base), config)
            wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
            for names, problem in ((set(stored) - set(wanted), "has no place"), (set(wanted) - set(stored), "missing")):
                if names:
                    raise UserError(f"{folder}: tensor {min(names)!r}: {problem} in a {type(base).__name__} so adapted")
            set_peft_model_state_dict(model, stored)
    except UserError:
        raise
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from None
    found: dict[str, Tensor] = {}
    for path, module in model.get_base_model().named_modules():
        state = module.state_dict()
        if isinstance(module, BaseTunerLayer):
            found |= {f"{path}{OURS}{name}": tensor for name, tensor in state.items() if "base_layer." not in name}
        elif isinstance(module, ModulesToSaveWrapper):
            found |= {f"{path}.{name}": t for name, t in module.modules_to_save["default"].state_dict().items()}
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # That a Conv1D has its weight the other way round, and names that transformers is giving up.
        warnings.simplefilter("ignore")
        yield
