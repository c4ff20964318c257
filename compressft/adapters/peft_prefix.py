"""PEFT's folder of a prefix: one row of keys and values of all layers for each virtual token."""

from __future__ import annotations

import base64
import inspect
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressft.adapters.files import CONFIG, TENSORS, write_json, write_tensors
from compressft.adapters.peft_model import modules_to_save, task_type, unsaveable
from compressft.adapters.settled import Settled, own_head, put, shared_copy
from compressft.errors import UserError, nearest
from compressft.methods.prefix import PrefixTuning, sites
from compressft.model.anatomy import anatomy
from compressft.modules.attention import prefix_of
from compressft.modules.embedding import CompressedEmbedding
from compressft.modules.prefix import Prefix
from compressft.modules.pretrained import pretrained
from compressft.transform import Context

KEY, NUDGES = "prompt_embeddings", "key_nudges"
FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_hidden_size",
    "inference_mode",
    "init_weights",
    "modules_to_save",
    "num_attention_heads",
    "num_layers",
    "num_transformer_submodules",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "revision",
    "task_type",
    "token_dim",
)
# Kinds of rotary positions whose frequencies do not depend on a row's length.
ROTARY = ("default", "linear", "llama3", "yarn")


def refusal(settled: Settled) -> str | None:
    """Why PEFT's format cannot hold this prefix, or None."""
    parts = anatomy(settled.model)
    fronts = [prefix_of(site.module) for site in sites(settled.model)]
    if not all(isinstance(front, Prefix) for front in fronts):
        return "some attentions have no prefix, and PEFT's format gives all of them one"
    family = _unfit(settled.plain)
    if family is not None:
        return family
    if task_type(settled.plain) is None:
        return f"PEFT has no prefixes for a {type(settled.plain).__name__}"
    shapes = {front.key.shape for front in fronts if isinstance(front, Prefix)}
    if len(shapes) > 1:
        return "its layers have different numbers of heads, and PEFT's format knows one"
    others = [m for m in settled.ours.values() if not isinstance(m, Prefix | CompressedEmbedding)]
    if others:
        return f"PEFT's format has no place for {type(others[0]).__name__} next to a prefix"
    length = shapes.pop()[1]
    if parts.family.positions is not None:
        table = parts.backbone.get_submodule(parts.family.positions)
        if not isinstance(table, CompressedEmbedding) or table.first != length or table.bits is not None:
            return (
                f"PEFT counts a row's positions from {length}, behind the prefix, and this one was trained with "
                "positions from 0; train it with shift_positions: true"
            )
    return unsaveable(settled, _held(settled))


def _held(settled: Settled) -> set[str]:
    return {name for name in settled.changed if ".prefix." in name}


def _unfit(model: nn.Module) -> str | None:
    """Why PEFT cannot put a prefix in front of this model, or None."""
    parts = anatomy(model)
    kind = pretrained(model).config.model_type
    if parts.family.decoder is not None:
        return f"prefixes of encoder-decoders ({kind}) are not exchanged with PEFT"
    if "past_key_values" not in inspect.signature(parts.backbone.forward).parameters:
        return f"PEFT has no prefixes for {kind}, whose forward takes no past_key_values"
    rotary = getattr(parts.backbone, "rotary_emb", None)
    if rotary is not None and getattr(rotary, "rope_type", "default") not in ROTARY:
        return f"rotary positions of kind {rotary.rope_type!r} depend on the row's length"
    return None


def turned(model: nn.Module, key: Tensor, places: int) -> Tensor:
    """Prefix keys (heads, P, size) as they act where queries count their positions from `places` further on.

    A rotary model turns a query by its position before it meets a prefix's key, which is not turned at all. PEFT's rows
    begin at position P and ours at 0, so that the same key is another by P positions. Without rotary positions it is
    the same.
    """
    rotary = getattr(anatomy(model).backbone, "rotary_emb", None)
    if rotary is None:
        return key
    angle = (places * rotary.inv_freq.double()).to(key.device)
    cos, sin = torch.cat([angle, angle]).cos(), torch.cat([angle, angle]).sin()
    first, second = key.double().chunk(2, -1)
    return (key.double() * cos + torch.cat([-second, first], -1) * sin).to(key.dtype)


def _nudges(exact: Sequence[Tensor], turned_back: Sequence[Tensor]) -> str:
    """How many fp32 values further each exact key is than what turning twice gives, as text for a file's header."""
    pairs = zip(exact, turned_back, strict=True)
    steps = torch.cat([(a.view(torch.int32) - b.view(torch.int32)).flatten() for a, b in pairs])
    return base64.b64encode(zlib.compress(steps.cpu().numpy().tobytes(), 9)).decode() if steps.any() else ""


def _nudged(keys: Sequence[Tensor], text: str) -> list[Tensor]:
    """Undo `_nudges`."""
    if not text:
        return list(keys)
    steps = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.int32)
    parts = steps.split([key.numel() for key in keys])
    return [
        (key.contiguous().view(torch.int32) + part.view(key.shape).to(key.device)).view(torch.float32)
        for key, part in zip(keys, parts, strict=True)
    ]


def write(settled: Settled, folder: Path, note: Mapping[str, str]) -> None:
    """Write PEFT's two files, without PEFT; `refusal` must have had no objection."""
    fronts = [prefix_of(site.module) for site in sites(settled.model)]
    pairs: list[Tensor] = []
    keys: list[Tensor] = []
    for front in fronts:
        assert isinstance(front, Prefix)
        length = front.key.shape[1]
        keys.append(front.key.detach().float())
        pairs += [turned(settled.plain, keys[-1], length), front.value.detach()]
    heads, length, size = pairs[0].shape
    again = [turned(settled.plain, key, -length) for key in pairs[::2]]
    saved = modules_to_save(settled, _held(settled))
    tensors = {KEY: torch.stack(pairs).permute(2, 0, 1, 3).reshape(length, -1)}
    for path in saved:
        state = settled.model.get_submodule(path).state_dict()
        tensors |= {f"base_model.{path}.{name}": tensor for name, tensor in state.items()}
    # PEFT reads the tensors; what turning a key twice rounds away is in the header.
    nudges = _nudges(keys, again)
    write_tensors(folder / TENSORS, tensors, {**note, NUDGES: nudges} if nudges else note)
    write_json(
        folder / CONFIG,
        {
            "auto_mapping": None,
            "base_model_name_or_path": str(getattr(settled.plain, "name_or_path", "") or "") or None,
            "encoder_hidden_size": heads * size,
            "inference_mode": True,
            "init_weights": None,
            "modules_to_save": saved or None,
            "num_attention_heads": heads,
            "num_layers": len(fronts),
            "num_transformer_submodules": 1,
            "num_virtual_tokens": length,
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "revision": None,
            "task_type": task_type(settled.plain),
            "token_dim": heads * size,
        },
    )


def read(
    base: nn.Module, folder: Path, values: Mapping[str, Any], stored: Mapping[str, Tensor], nudges: str = ""
) -> Settled:
    """A prefix of PEFT's on a tree of this base's tensors.

    Args:
        nudges: as `write` puts them into the header under `NUDGES`.

    Raises:
        UserError: PEFT itself has none for such a model; a tensor is missing, unknown or has another shape.
    """
    family = _unfit(base)
    if family is not None:
        raise UserError(f"{folder}: {family}")
    for name, value in values.items():
        if name not in FIELDS and value not in (None, [], {}):
            raise UserError(f"{folder / CONFIG}: unknown field {name}{nearest(name, FIELDS)}")
    if values.get("num_transformer_submodules", 1) != 1:
        raise UserError(f"{folder / CONFIG}: num_transformer_submodules is for encoder-decoders; 1 is read")
    if KEY not in stored:
        raise UserError(f"{folder}: tensor {KEY!r} is missing")
    rows = stored[KEY]
    places = list(sites(base))
    length, width = int(values.get("num_virtual_tokens") or 0), sum(2 * site.heads * site.size for site in places)
    if rows.shape != (length, width):
        raise UserError(f"{folder}: tensor {KEY!r} has shape {tuple(rows.shape)}, the model wants {(length, width)}")
    positions = anatomy(base).family.positions
    method = PrefixTuning(length=length, reparameterise=False, shift_positions=positions is not None or None)
    tree = shared_copy(base)
    method.prepare(tree, Context())
    site = places[0]
    pairs = rows.view(length, 2 * len(places), site.heads, site.size).permute(1, 2, 0, 3)
    keys = _nudged([turned(base, pairs[2 * number], -length) for number in range(len(places))], nudges)
    with torch.no_grad():
        for number, place in enumerate(sites(tree)):
            front = prefix_of(place.module)
            assert isinstance(front, Prefix)
            front.key.copy_(keys[number])
            front.value.copy_(pairs[2 * number + 1])
    head = {name.removeprefix("base_model."): tensor for name, tensor in stored.items() if name != KEY}
    put(tree, {}, head, str(folder))
    return Settled(tree.eval(), base, method, own_head(tree, base))
