"""Prove that a file with a cache goes on from it as the trained model does: single tokens and several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from compressft.evaluation.inputs import empty_past
from compressft.evaluation.logits import open_session, places
from compressft.export.cache import PAST, PRESENT
from compressft.export.verify import KERNELS
from compressft.modules.pretrained import pretrained
from compressft.modules.quantizer import Int8Quantizer
from compressft.tasks.task import Feature, Task
from compressft.utils.phases import phase, steps

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

# Rows that are continued, and tokens of each that are given one by one.
ROWS, SINGLE = 8, 16


@dataclass(frozen=True)
class Continued:
    """One comparison of the file with the trained model, both going on from their caches.

    `batch` rows were padded on the left. `token_agreement`: share of the `tokens` after which both put the same first.
    """

    kernels: str
    batch: int
    tokens: int
    max_abs_error: float
    token_agreement: float

    def row(self) -> dict[str, object]:
        """As it stands in report.json."""
        return asdict(self)

    def failure(self, least: float) -> str | None:
        """What is missed, if anything."""
        ran = f"batch {self.batch}, {self.kernels} kernels"
        if not np.isfinite(self.max_abs_error):
            return f"the file's logits behind its cache are not finite ({ran})"
        if self.token_agreement < least:
            return (
                f"behind its cache the file puts the trained model's token first in {self.token_agreement:.4f} of the "
                f"cases, below export.label_agreement {least} ({ran})"
            )
        return None


@dataclass(frozen=True)
class Chunk:
    """What is given at once: ids and places (B, T), and the mask (B, past + T) of all tokens so far."""

    ids: np.ndarray
    mask: np.ndarray
    places: np.ndarray


@phase("verification")
def continue_rows(file: Path, model: nn.Module, task: Task, features: Sequence[Feature]) -> list[Continued]:
    """Compare logits at every token of some rows, read as a prompt, `SINGLE` single tokens and a rest.

    Two rows by themselves and all padded on the left (but for dynamic ranges), with exact and with default kernels.
    """
    rows = [list(feature["input_ids"]) for feature in features[:ROWS]]
    batches = [[row] for row in rows[:2]]
    # A dynamic range is also the paddings', of which torch and onnxruntime make what they like.
    if len(rows) > 1 and not any(isinstance(m, Int8Quantizer) and m.ranges == "dynamic" for m in model.modules()):
        batches.append(rows)
    prepared = [list(chunks(*padded_left(batch, task.tokenizer.pad_token_id))) for batch in batches]
    trained = [model_chunks(model, parts) for parts in steps(prepared, "continuing rows in torch")]
    found = []
    for kernels in KERNELS:
        session = open_session(file, exact=kernels == "exact")
        for parts, want in steps(list(zip(prepared, trained, strict=True)), f"continuing rows, {kernels} kernels"):
            got = session_chunks(session, parts)
            real = parts[-1].mask.astype(bool)
            error = float(np.abs(want - got)[real].max())
            same = float((want.argmax(-1) == got.argmax(-1))[real].mean())
            found.append(Continued(kernels, len(real), int(real.sum()), error, same))
        del session
    return found


def padded_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask (B, T), int64."""
    width = max(map(len, rows))
    ids = np.array([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def chunks(ids: np.ndarray, mask: np.ndarray) -> Iterator[Chunk]:
    """Half of the tokens, then single ones, then what is left."""
    width, where = ids.shape[1], places(mask)
    cuts = [0, max(width // 2, 1)]
    while cuts[-1] < width:
        cuts.append(cuts[-1] + 1 if len(cuts) < SINGLE + 2 else width)
    for start, end in pairwise(cuts):
        yield Chunk(ids[:, start:end], mask[:, :end], where[:, start:end])


@torch.no_grad()
def model_chunks(model: nn.Module, parts: Sequence[Chunk]) -> np.ndarray:
    """Logits (B, T, V) of all chunks in a row, with a cache of transformers'."""
    from transformers import DynamicCache

    cache, found = DynamicCache(config=pretrained(model).config), []
    for part in parts:
        ids, mask, where = (torch.from_numpy(x) for x in (part.ids, part.mask, part.places))
        out = model.eval()(
            input_ids=ids, attention_mask=mask, position_ids=where, past_key_values=cache, use_cache=True
        )
        found.append(_array(out.logits))
    return np.concatenate(found, axis=1)


def session_chunks(session: InferenceSession, parts: Sequence[Chunk]) -> np.ndarray:
    """The same of an exported file."""
    past, found = empty_past(session.get_inputs(), len(parts[0].ids)), []
    names = [value.name for value in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    for part in parts:
        given = {"input_ids": part.ids, "attention_mask": part.mask, "position_ids": part.places, **past}
        out = dict(zip(names, session.run(None, {k: v for k, v in given.items() if k in wanted}), strict=True))
        found.append(out.pop("logits"))
        past = {name.replace(PRESENT, PAST, 1): value for name, value in out.items()}
    return np.concatenate(found, axis=1)


def _array(logits: Tensor) -> np.ndarray:
    return logits.float().cpu().numpy()
