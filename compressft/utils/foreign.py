"""The door for files of other people: their loaders run no code of the file's and never ask, and fail in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from compressft.errors import UserError, reason, trouble
from compressft.utils.hub import pinned

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

# A library's message may hold a file.
LONGEST = 400
# Building more takes minutes, on the meta device too.
MOST_LAYERS = 2000


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Around a library's loader: whatever it raises is a UserError that begins with `what`.

    Loaders of damaged files raise anything: KeyError, TypeError, RecursionError, errors of Rust and C++.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = trouble(error) or reason(error)
        if len(said) > LONGEST:
            said = f"{said[:LONGEST]}..."
        raise UserError(f"{what}: {said}") from error


def load_config(source: str | Path, what: str = "model", **changes: object) -> PretrainedConfig:
    """A transformers configuration.

    Args:
        source: a folder, or a hub id with or without a revision ("owner/name@v1.0").
        what: begins the message, such as the recipe's field.
        changes: fields to set (`num_labels`, ...).

    Raises:
        UserError: there is none, it is broken, or of a class that only its own code knows.
    """
    import transformers

    with foreign(f"{what}: no configuration could be loaded from {str(source)!r}"):
        name, revision = pinned(str(source))
        found = transformers.AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False, **changes
        )
    claimed = getattr(found, "num_hidden_layers", None)
    if isinstance(claimed, int) and claimed > MOST_LAYERS:
        raise UserError(f"{what}: {str(source)!r} claims {claimed:,} layers; at most {MOST_LAYERS:,} are built")
    return found


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        UserError: it is missing or none.
    """
    from safetensors.torch import load_file

    with foreign(f"{path}: cannot be read as safetensors"):
        return load_file(path)
