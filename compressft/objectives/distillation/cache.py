"""A teacher's answers on the disk, keyed by what decides them, so that every example is asked about once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressft.errors import UserError
from compressft.objectives.distillation.teacher import Answer

if TYPE_CHECKING:
    from safetensors import safe_open

KEY_BYTES = 32
# Files of answers that are kept open.
MOST_OPEN = 256


class AnswerCache:
    """Logits and hidden states per example in a folder of safetensors files, read through the page cache.

    An example is its real tokens' ids and segments as the teacher gets them; paddings are not stored and come back as
    0. Each batch's new examples are one file, written next to its place, flushed and renamed: a kill leaves a whole
    file or none, and a run resumed from a checkpoint finds every answer given before it. An example keeps the
    answer it got first, whatever batch it is in later, so a cached run differs from an uncached one by what other
    paddings and other neighbours do to rounding (nothing where batches repeat), and by the storage's own rounding
    in fp16.

    Bytes per example: 4 (fp16: 2) * (classes + hidden layers * tokens * width); per-token logits count per token.

    Args:
        folder: of this teacher and these tensors alone; None keeps a temporary one.
        dtype: float32 or float16.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        self.folder = folder if folder is not None else Path(tempfile.mkdtemp(prefix="compressft-"))
        if folder is None:
            weakref.finalize(self, shutil.rmtree, self.folder, True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dtype = dtype
        # example -> (file, row, first token, token after the last)
        self._places: dict[bytes, tuple[Path, int, int, int]] = {}
        self._files: dict[Path, safe_open] = {}
        for path in self.folder.glob(".*.tmp"):
            path.unlink()
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def answer(self, inputs: Mapping[str, Tensor], compute: Callable[[dict[str, Tensor]], Answer]) -> Answer:
        """The answer to a batch; `compute` is called with the rows that are new, or not at all.

        Raises:
            UserError: a value is beyond the range of fp16.
        """
        masks = inputs["attention_mask"].bool()
        keys = _keys(inputs, masks)
        missing = [row for row, key in enumerate(keys) if key not in self._places]
        # The same text twice in one batch is one example.
        missing = list({keys[row]: row for row in reversed(missing)}.values())[::-1]
        if missing:
            index = torch.tensor(missing, device=masks.device)
            rows = {name: value[index] for name, value in inputs.items()}
            self._store([keys[row] for row in missing], compute(rows), rows["attention_mask"].bool())
        return self._read(keys, masks)

    def _store(self, keys: Sequence[bytes], answer: Answer, masks: Tensor) -> None:
        from safetensors.torch import save_file

        tensors = {f"hidden.{layer}": state[masks] for layer, state in answer.hidden.items()}
        if answer.logits is not None:
            per_token = answer.logits.dim() == 3
            tensors["token_logits" if per_token else "logits"] = answer.logits[masks] if per_token else answer.logits
        tensors = {name: value.to(self.dtype).cpu().contiguous() for name, value in tensors.items()}
        for name, value in tensors.items():
            if self.dtype is torch.float16 and not torch.isfinite(value).all():
                raise UserError(f"objective distill.cache_precision: {name} is beyond the range of fp16; use fp32")
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), KEY_BYTES)
        tensors["lengths"] = masks.sum(1).cpu()
        path = self.folder / f"{hashlib.sha256(b''.join(keys)).hexdigest()[:32]}.safetensors"
        staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file(tensors, staging)
        with staging.open("rb+") as file:
            os.fsync(file.fileno())
        staging.replace(path)
        self._open(path)

    def _open(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                keys, lengths = file.get_tensor("keys"), file.get_tensor("lengths").tolist()
        except SafetensorError:
            # Damaged from outside: its examples are asked about again.
            path.unlink()
            return
        end = 0
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            start, end = end, end + length
            self._places[key.numpy().tobytes()] = (path, row, start, end)

    def _read(self, keys: Sequence[bytes], masks: Tensor) -> Answer:
        device, masks = masks.device, masks.cpu()
        places = [self._places[key] for key in keys]
        files = [self._file(path) for path, *_ in places]
        placed: dict[str, Tensor] = {}
        for name in sorted(set(files[0].keys()) - {"keys", "lengths"}):
            per_token = name != "logits"
            spans = [(start, end) if per_token else (row, row + 1) for _, row, start, end in places]
            # Opened files and rows side by side: what is read is put into its place once.
            # In fp32 before they are joined: autocast to bf16 refuses to join fp16 on a CPU.
            parts = [file.get_slice(name)[start:end].float() for file, (start, end) in zip(files, spans, strict=True)]
            values = torch.cat(parts)
            if per_token:
                whole = torch.zeros(*masks.shape, values.shape[1])
                whole[masks] = values
                values = whole
            placed[name] = values.to(device)
        hidden = {int(name.split(".")[1]): v for name, v in placed.items() if name.startswith("hidden.")}
        return Answer(placed.get("logits", placed.get("token_logits")), hidden)

    def _file(self, path: Path) -> safe_open:
        """The file, open: a batch reads from as many as it has rows."""
        from safetensors import safe_open

        if path not in self._files:
            while len(self._files) >= MOST_OPEN:
                self._files.pop(next(iter(self._files)))
            self._files[path] = safe_open(path, "pt")
        return self._files[path]


def _keys(inputs: Mapping[str, Tensor], masks: Tensor) -> list[bytes]:
    masks = masks.cpu()
    columns = [inputs[name].cpu() for name in ("input_ids", "token_type_ids") if name in inputs]
    keys = []
    for row, mask in enumerate(masks):
        digest = hashlib.sha256()
        for column in columns:
            digest.update(column[row][mask].numpy().tobytes() + b"|")
        keys.append(digest.digest())
    return keys
