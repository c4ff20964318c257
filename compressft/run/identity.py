"""What a run is made of besides its recipe: the bytes that it reads, its threads and processes, its versions.

They are recorded when it begins and compared when it goes on: other bytes are refused by name, the number of threads is
taken over, other versions are said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from compressft.data.hub import hub_hash, hub_state
from compressft.data.source import DataConfig
from compressft.data.splits import source_files
from compressft.errors import UserError
from compressft.model.saved.manifest import SEAL, check_seal, require, sealed
from compressft.model.source import resolve
from compressft.recipe.document import recorded_hash
from compressft.recipe.recipe import Recipe
from compressft.utils import ranks
from compressft.utils.files import file_hash, file_state
from compressft.utils.hub import pinned
from compressft.utils.machine import hardware, usable_cores, versions
from compressft.utils.texts import read_object

FILE = "identity.json"
FORMAT = 1
# What loaders read of the folder of a model, an adapter or a tokenizer; pickled weights where there are no others.
READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".bpe", ".codes", ".spm", ".tiktoken", ".vocab")
PICKLED = (".bin", ".pt", ".pth")
REVISION = "revision:"
UNKNOWN = (
    "an older version began this run and has no record of its data and models: whether they have changed since cannot "
    "be compared"
)


@dataclass(frozen=True)
class Input:
    """Something that a run reads.

    Attributes:
        key: the recipe's field, and behind a slash the file in the folder that it names.
        shown: its path, or its name on the hub.
        digest: what it is now, given what it was; None where it cannot be read.
    """

    key: str
    shown: str
    digest: Callable[[str | None], str | None]

    @property
    def field(self) -> str:
        """The recipe's field, as it is written there."""
        return field_of(self.key)


def field_of(key: str) -> str:
    """The recipe's field of an `Input.key`: files of a list are counted there."""
    return re.sub(r"\.\d+$", "", key.partition("/")[0])


@dataclass(frozen=True)
class Identity:
    """What a run began with.

    Attributes:
        recipe: hash of its recipe.yaml (`document_hash`).
        inputs: hash by `Input.key`; a revision for a model on the hub.
        threads: torch's, on whose number the order of sums depends.
        about: versions and processors, on which last bits depend.
        processes: how many shared the rows of a step; None where an older version did not say.
    """

    recipe: str
    inputs: Mapping[str, str]
    threads: int
    about: Mapping[str, str]
    processes: int | None = None


def inputs(recipe: Recipe, done: Collection[str] = ()) -> Iterator[Input]:
    """All that a run of a recipe reads.

    Args:
        done: names of finished stages, whose teachers and adapters are not read again.
    """
    streamed = [
        f"{place}.train.{number}"
        for place, data in _sources(recipe)
        if data.streaming
        for number in range(len(source_files(data).get("train", ())))
    ]
    for place, data in _sources(recipe):
        if data.dataset is not None:
            yield Input(f"{place}.dataset", f"{place}.dataset: {data.dataset!r}", partial(_hub_digest, data))
    for key, name in _named(recipe, done):
        if key.startswith("data."):
            yield _file(key, Path(name).expanduser(), file_state if key in streamed else _hash_of)
        else:
            yield from _of_folder(key, name)


def _named(recipe: Recipe, done: Collection[str]) -> Iterator[tuple[str, str]]:
    """(key, name) of the files, folders and models on the hub that a recipe names."""
    yield "model", recipe.model
    for place, data in _sources(recipe):
        for split, files in source_files(data).items():
            yield from ((f"{place}.{split}.{number}", file) for number, file in enumerate(files))
    stages = [stage.name for stage in recipe.stages]
    for stage in recipe.stages:
        for transform in stage.transforms if stage.name not in done else ():
            for number, name in enumerate(transform.inputs()):
                if name not in stages:
                    yield f"stages.{stage.name}.{transform.type}.{number}", name


def _sources(recipe: Recipe) -> Iterator[tuple[str, DataConfig]]:
    """The recipe's field of every source of rows, and what it says."""
    return ((f"data.{name}" if name else "data", data) for name, data in recipe.sources.items())


def _hub_digest(data: DataConfig, before: str | None) -> str:
    assert data.dataset is not None
    return hub_state(data.dataset, data.subset) if data.streaming else hub_hash(data.dataset, data.subset)


def _hash_of(path: Path) -> str:
    return f"sha256:{file_hash(path)}"


def _file(key: str, path: Path, digest_of: Callable[[Path], str] = _hash_of) -> Input:
    def digest(before: str | None) -> str | None:
        try:
            return digest_of(path) if path.is_file() else None
        except OSError:
            # Whoever reads it says why it cannot be read.
            return None

    return Input(key, str(path), digest)


def _of_folder(key: str, name: str) -> Iterator[Input]:
    """The files of a folder that loaders read; else a file, or a model on the hub."""
    path = _place(name)
    if path.is_dir():
        yield from (_file(f"{key}/{file.name}", file) for file in _read_of(path))
    elif path.is_file() or name.startswith((".", "/", "~")):
        yield _file(key, path)
    else:
        yield Input(key, f"{field_of(key)}: {name!r} (on the hub)", partial(_revision_digest, name))


def _place(name: str) -> Path:
    path = Path(name).expanduser()
    try:
        return path if path.is_file() else Path(resolve(name))
    except UserError:
        # Whoever loads it says so.
        return path


def _read_of(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    kinds = READ if any(path.suffix == ".safetensors" for path in files) else (*READ, *PICKLED)
    return [path for path in files if path.suffix in kinds]


def _revision_digest(name: str, before: str | None) -> str | None:
    """The hub's revision of a model; that of before where all files that were read then are the same now."""
    found = _cached(name, "config.json")
    if found is None:
        return None
    now = f"{REVISION}{found.parent.name}"
    if before is None or before == now:
        return now
    old = found.parent.parent / before.removeprefix(REVISION)
    files = _read_of(old) if old.is_dir() else []
    again = {file: _cached(name, file.name) for file in files}
    same = files and all(new is not None and file_hash(new) == file_hash(file) for file, new in again.items())
    return before if same else now


def _cached(name: str, file: str) -> Path | None:
    """Where a file of a model on the hub is; it is fetched where it is not here yet."""
    from transformers.utils.hub import cached_file

    try:
        where, revision = pinned(name)
        found = cached_file(where, file, revision=revision)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def model_revision(root: Path) -> str | None:
    """The commit of a run's model on the hub; None where it came from elsewhere."""
    begun = read(root)
    digest = "" if begun is None else begun.inputs.get("model", "")
    return digest.removeprefix(REVISION) if digest.startswith(REVISION) else None


def identify(root: Path, recipe: Recipe, console: Console) -> Identity:
    """Record what a run is made of when it begins; compare it when the run goes on.

    Args:
        root: the run directory, with its recipe.yaml.
        console: is told what cannot be compared, and what differs without being refused.

    Returns:
        what the run began with.

    Raises:
        UserError: recipe.yaml, a file or a data set has changed since; the message names it.
    """
    begun = read(root)
    if begun is None:
        if any((root / name).is_dir() for name in ("stages", "checkpoints", "model")):
            _say(console, f"{root}: {UNKNOWN}")
        begun = _now(root, recipe)
        _write(root, begun)
        return begun
    if begun.recipe != recorded_hash(root / "recipe.yaml"):
        raise UserError(f"{root / 'recipe.yaml'}: has changed since the run began; restore it")
    done = [stage.name for stage in recipe.stages if (root / "stages" / stage.name).is_dir()]
    refuse_changed(begun, recipe, done)
    others = [f"{name} {now} ({was})" for name, was, now in _differences(begun.about, _about())]
    if others:
        said = "goes on with other versions or processors than it began with, so that last bits may differ"
        _say(console, f"{said}: {', '.join(others)}")
    if begun.threads != torch.get_num_threads():
        here = f"{torch.get_num_threads()} were set, {usable_cores()} cores are here"
        _say(console, f"goes on with {begun.threads} threads, as it began ({here}): their number decides last bits")
    if begun.processes not in (None, ranks.count()):
        _say(console, f"processes: {begun.processes} began it, {ranks.count()} go on; a step has the same rows")
    return begun


def refuse_changed(
    begun: Identity, recipe: Recipe, done: Collection[str] = (), wanted: Callable[[str], bool] = lambda key: True
) -> None:
    """Compare what a run reads with what it read when it began.

    Args:
        done: as for `inputs`.
        wanted: says of an `Input.key` whether it is compared.

    Raises:
        UserError: something has changed, is missing or new; the message names it.
    """
    fix = "or start a new run in another directory"
    present = {one.key: one for one in inputs(recipe, done) if wanted(one.key)}
    names = dict(_named(recipe, done))
    for key in begun.inputs:
        root, _, file = key.partition("/")
        if key not in present and root in names and wanted(key):
            path = _place(names[root]) / file
            # Pickled weights are there, but no longer read, where others have come.
            if not path.is_file():
                raise UserError(f"{path}: is missing, and the run began with it ({field_of(key)}); restore it, {fix}")
    for key, one in present.items():
        was = begun.inputs.get(key)
        found = one.digest(was)
        if was is None and found is not None:
            raise UserError(f"{one.shown}: was not there when the run began ({one.field}); remove it, {fix}")
        if was is not None and found is None:
            raise UserError(f"{one.shown}: is missing, and the run began with it ({one.field}); restore it, {fix}")
        if was != found:
            raise UserError(f"{one.shown}: has changed since the run began ({one.field}); restore it, {fix}")


def read(root: Path) -> Identity | None:
    """What a run directory says that its run began with; None where it does not.

    Raises:
        UserError: the file is broken or was changed.
    """
    path = root / FILE
    if not path.is_file():
        return None
    entry = read_object(path)
    require(entry, ("format", "recipe", "inputs", "threads", "about", SEAL), path)
    check_seal(entry, path)
    if entry["format"] != FORMAT:
        raise UserError(f"{path}: format {entry['format']!r}; this compressft reads {FORMAT}")
    return Identity(entry["recipe"], entry["inputs"], entry["threads"], entry["about"], entry.get("processes"))


def _now(root: Path, recipe: Recipe) -> Identity:
    found = {one.key: one.digest(None) for one in inputs(recipe)}
    present = {key: digest for key, digest in found.items() if digest is not None}
    return Identity(recorded_hash(root / "recipe.yaml"), present, torch.get_num_threads(), _about(), ranks.count())


def _about() -> dict[str, str]:
    return {**versions(), **{name: value for name, value in hardware().items() if name in ("cpu", "gpu")}}


def _differences(was: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys((*was, *now))
    pairs = [(name, was.get(name, "none"), now.get(name, "none")) for name in names]
    return [(name, before, after) for name, before, after in pairs if before != after]


def _write(root: Path, identity: Identity) -> None:
    staging = root / ".identity.tmp"
    with staging.open("w", encoding="utf-8") as file:
        file.write(json.dumps(sealed({"format": FORMAT, **asdict(identity)}), indent=1))
        file.flush()
        os.fsync(file.fileno())
    staging.rename(root / FILE)


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def with_threads(number: int) -> Iterator[None]:
    """Inside, torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
