"""The run directory: its lock, its recipe, its resumable checkpoints and its metrics log."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from compressft.errors import UserError, trouble
from compressft.model.saved.folders import MANIFEST, read_manifest, verify_files, write_manifest
from compressft.recipe.document import recorded_hash
from compressft.recipe.recipe import Recipe, parse_recipe
from compressft.run.identity import FILE as IDENTITY
from compressft.run.space import shipping_bytes, training_bytes
from compressft.utils import ranks
from compressft.utils.entries import DROPPED, refuse_links, sweep
from compressft.utils.files import flush, sync
from compressft.utils.strict_yaml import read_yaml
from compressft.utils.texts import read_json, read_text


class RunFolder:
    """A run directory, held exclusively while a run writes to it.

    A claim is given up again where an error ends the run before it wrote anything: the directory is as it was.

    Args:
        root: the directory; created where it does not exist.
        recipe: what runs there.
        resume: go on with what is there; without it a directory that holds a run is refused.

    Raises:
        UserError: in use by another run, not empty, not writable, of another recipe, or with links out of it.
    """

    def __init__(self, root: str | Path, recipe: Recipe, resume: bool) -> None:
        self.root = Path(root).expanduser()
        self.recipe = recipe
        self._lock = _lock(self.root)
        self._made = not self.root.exists()
        self._claimed = False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            refuse_links(self.root)
            self._refuse_others()
        except OSError as error:
            raise UserError(f"--output {str(self.root)!r}: cannot be written to: {error.strerror or error}") from None
        _hold(self._lock, f"--output {str(self.root)!r}")
        try:
            self._claim(resume)
            sweep(self.root)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        said = trouble(error) if isinstance(error, Exception) and not isinstance(error, UserError) else None
        if self._claimed and error is not None:
            self._give_up()
        self._lock.release()
        if said is not None:
            raise UserError(
                f"--output {str(self.root)!r}: {said}; then go on with the same command and --resume"
            ) from error

    def _give_up(self) -> None:
        recipe, lock, identity = (self.root / name for name in ("recipe.yaml", ".lock", IDENTITY))
        found = set(self.root.rglob("*"))
        folders = {path for path in found if path.is_dir() and not path.is_symlink()}
        if found - folders - {identity} != {recipe, lock}:
            return
        # The Trainer makes its folder before it has anything to write.
        for folder in sorted(folders, reverse=True):
            folder.rmdir()
        identity.unlink(missing_ok=True)
        recipe.unlink()
        # Windows keeps a file that is open.
        with suppress(OSError):
            lock.unlink()
            if self._made:
                self.root.rmdir()

    def _refuse_others(self) -> None:
        names = sorted(path.name for path in self.root.iterdir() if path.name not in (".lock", ".recipe.tmp"))
        if names and "recipe.yaml" not in names:
            raise UserError(f"--output {str(self.root)!r}: is not empty ({names[0]!r}); choose an empty directory")

    def _claim(self, resume: bool) -> None:
        saved = self.root / "recipe.yaml"
        if saved.is_file():
            if not resume:
                raise UserError(
                    f"--output {str(self.root)!r}: holds a run already; "
                    "add --resume to go on with it or choose another directory"
                )
            before = parse_recipe(read_yaml(read_text(saved), str(saved)), str(saved))
            if before.hash != self.recipe.hash:
                raise UserError(
                    f"{saved}: --resume wants the recipe of the run ({before.hash[:19]}); "
                    f"this one is {self.recipe.hash[:19]}"
                )
            return
        staging = self.root / ".recipe.tmp"
        staging.write_text(self.recipe.to_yaml(), encoding="utf-8")
        staging.rename(saved)
        self._claimed = True

    def check_space(self, model_bytes: int) -> None:
        """Refuse to start what cannot be saved: the checkpoints, or, where nothing is left to train, what ships.

        Args:
            model_bytes: of the uncompressed model.

        Raises:
            UserError: less is free than that.
        """
        free = shutil.disk_usage(self.root).free
        if all(self._trained(stage.name) for stage in self.recipe.stages):
            what, wanted = "what is left to write needs", shipping_bytes(self.root, self.recipe, model_bytes)
        else:
            what, wanted = "checkpoints need", training_bytes(self.root, model_bytes)
        if free < wanted:
            raise UserError(
                f"--output {str(self.root)!r}: {free / 1e9:.2f} GB free, "
                f"{what} about {wanted / 1e9:.2f} GB; free some space"
            )

    def _trained(self, stage: str) -> bool:
        """Whether a stage's last step is in a checkpoint, or the stage is finished."""
        return (self.stage(stage) / MANIFEST).is_file() or any(
            manifest.get("stage") == stage and manifest.get("done", False)
            for manifest in (read_manifest(path, "checkpoint", files=False) for path in self.checkpoints())
        )

    @cached_property
    def recipe_hash(self) -> str:
        """Hash of the recipe as it was written when the run began, which all that it ships records."""
        return recorded_hash(self.root / "recipe.yaml")

    # Finished stages: a compressed model folder each.

    def stage(self, name: str) -> Path:
        """Folder of a finished stage's model."""
        return self.root / "stages" / name

    def finished(self, name: str) -> dict[str, Any] | None:
        """What was recorded of a finished stage, None before.

        Raises:
            UserError: it is damaged, or another recipe's.
        """
        if not (self.stage(name) / MANIFEST).is_file():
            return None
        manifest = read_manifest(self.stage(name), "model", ("stage",))
        if manifest.get("recipe_hash", self.recipe_hash) != self.recipe_hash:
            raise UserError(
                f"{self.stage(name)}: was trained by another recipe than {self.root / 'recipe.yaml'}; restore the two, "
                "or start a new run in another directory"
            )
        return manifest["stage"]

    # What must not be measured or drawn again by a resumed run.

    def memo(self, key: str, compute: Callable[[], Any]) -> Any:
        """compute(), a JSON value, written to `memo/KEY.json`; read from there once it is.

        Of several processes the first computes.
        """
        path = self.root / "memo" / f"{key}.json"
        if ranks.first() and not path.is_file():
            path.parent.mkdir(exist_ok=True)
            staging = path.with_name(f".{path.name}.tmp")
            staging.write_text(json.dumps(compute()), encoding="utf-8")
            staging.rename(path)
        ranks.wait()
        return read_json(path)

    # Resumable checkpoints.

    @property
    def staging(self) -> Path:
        """Where the Trainer writes; what is left here after a crash is worthless."""
        return self.root / "checkpoints" / ".writing"

    def publish(self, written: Path, step: int, info: dict[str, Any], keep: int) -> Path:
        """Hash, flush and rename a checkpoint to `checkpoints/step-N`, then drop the older ones.

        Args:
            step: cumulative over stages.
            info: recorded next to the hashes (stage, seconds).
        """
        write_manifest(written, "checkpoint", {"step": step, **info})
        sync(written)
        final = self.root / "checkpoints" / f"step-{step}"
        if final.exists():
            # Saved at its step and again at the end of its epoch: the same state, and the only one if it were removed.
            shutil.rmtree(written)
            return final
        written.rename(final)
        flush(final.parent)
        for older in self.checkpoints()[:-keep]:
            # Out of sight first: a kill amid the deletion must not leave half a checkpoint under its name.
            dropped = older.with_name(DROPPED + older.name)
            older.rename(dropped)
            shutil.rmtree(dropped, ignore_errors=True)
        return final

    def checkpoints(self) -> list[Path]:
        """All published checkpoints, oldest first."""
        found = (self.root / "checkpoints").glob("step-*")
        return sorted(found, key=lambda p: int(re.sub(r"\D", "", p.name) or 0))

    def newest(self, stage: str) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint of a stage, its files compared with their hashes.

        Raises:
            UserError: it is truncated or changed; the message names the file.
        """
        if ranks.first():
            for leftover in (self.staging, *self.staging.parent.glob(f"{DROPPED}*")):
                shutil.rmtree(leftover, ignore_errors=True)
        ranks.wait()
        for path in reversed(self.checkpoints()):
            manifest = read_manifest(path, "checkpoint", files=False)
            if manifest.get("stage") == stage:
                verify_files(path, manifest["files"])
                return path, {**manifest}
        return None

    # Metrics.

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.root / "metrics.jsonl"

    def log(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Forget rows that a resumed run writes again: those after a step, and its evaluation if not `evaluated`."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                # A kill can tear the last line.
                continue
            again = row["step"] == step and row["kind"] == "eval" and not evaluated
            if row["step"] <= step and not again:
                kept.append(line)
        staging = self.root / ".metrics.tmp"
        staging.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        staging.rename(self.metrics)


class SharedFolder(RunFolder):
    """The run directory as the other processes of the same run see it: the first one holds it and writes."""

    def __init__(self, root: str | Path, recipe: Recipe) -> None:
        self.root = Path(root).expanduser()
        self.recipe = recipe

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held."""

    def check_space(self, model_bytes: int) -> None:
        """The first process checks."""

    def publish(self, written: Path, step: int, info: dict[str, Any], keep: int) -> Path:
        """Where the first process publishes it."""
        return self.root / "checkpoints" / f"step-{step}"

    def log(self, row: dict[str, Any]) -> None:
        """The first process logs."""

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """The first process rewinds."""


def open_folder(root: str | Path, recipe: Recipe, resume: bool) -> RunFolder:
    """The run directory of a run of one process or several; arguments and errors as `RunFolder`'s."""
    folder = RunFolder(root, recipe, resume) if ranks.first() else SharedFolder(root, recipe)
    ranks.wait()
    return folder


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Inside, this process alone writes to a finished run's directory, without what a killed one left there.

    Raises:
        UserError: another process writes there, or it is not writable.
    """
    lock = _lock(root)
    _hold(lock, repr(str(root)))
    try:
        sweep(root)
        yield
    finally:
        lock.release()


def _lock(root: Path) -> BaseFileLock:
    # Whichever thread holds it: a run may be closed by another one.
    return FileLock(root / ".lock", timeout=0, thread_local=False)


def _hold(lock: BaseFileLock, where: str) -> None:
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{where}: another run is writing there; wait for it or choose another") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be written to: {error.strerror or error}") from None
