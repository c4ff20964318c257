"""Upload what a run has verified, with its model card, to the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressft.errors import UserError
from compressft.model.saved.folders import MANIFEST, manifest_seal, read_manifest
from compressft.recipe.document import refuse_edited
from compressft.recipe.recipe import Recipe, load_recipe
from compressft.run.again import finished_run
from compressft.run.card import CARD, model_card
from compressft.run.folder import held
from compressft.utils.foreign import foreign
from compressft.utils.texts import read_object

PARTS = ("onnx", "model", "delta")


@dataclass(frozen=True)
class Target:
    """Where a folder goes.

    Attributes:
        repo: "owner/name", or a name below the user's own.
        private: of a repository that is made anew.
        revision: the branch; the hub's default where it is None.
    """

    repo: str
    private: bool = False
    revision: str | None = None


def push(root: str | Path, target: Target, part: str | None = None) -> str:
    """Upload one folder of a finished run: its recorded files and the card, nothing that lies beside them.

    Args:
        part: "onnx" (the default where the run exports), "model" or "delta".

    Returns:
        the address of the commit.

    Raises:
        UserError: no finished run, a smoke run, one whose file is not verified or has changed since; no token; the hub
            refuses.
    """
    folder = finished_run(root)
    refuse_edited(folder / "recipe.yaml", read_manifest(folder / "model", "model").get("recipe_hash"))
    recipe = load_recipe(folder / "recipe.yaml")
    part = part or ("onnx" if recipe.export.enabled else "model")
    with held(folder):
        report = _verified(recipe, folder, part)
        model_card(recipe, report, part).save(folder / part / CARD)
        return _upload(folder / part, target, recipe)


def _verified(recipe: Recipe, folder: Path, part: str) -> dict[str, Any]:
    """The report of a run whose file was proved, of this very file.

    Raises:
        UserError: there is none.
    """
    if part not in PARTS:
        raise UserError(f"--part {part!r}: is no folder that ships; allowed: {', '.join(PARTS)}")
    again = f"export it again: compressft export {folder}"
    if recipe.smoke:
        raise UserError(f"{folder}: is a smoke run, whose file nobody verified; run the recipe without --smoke")
    if recipe.export.enabled and not (folder / "onnx" / MANIFEST).is_file():
        kept = " (what failed is in onnx.failed/)" if (folder / "onnx.failed").is_dir() else ""
        raise UserError(f"{folder}: has no verified ONNX file{kept}; {again}")
    if not (folder / part / MANIFEST).is_file():
        raise UserError(f"{folder}: has no {part}/; give --part model")
    path = folder / "report" / "report.json"
    if not path.is_file():
        raise UserError(f"{path}: does not exist, so nothing is known of the run; {again}")
    report = read_object(path)
    if recipe.export.enabled:
        read_manifest(folder / "onnx", "onnx")
        if report.get("onnx_hash") != manifest_seal(folder / "onnx"):
            raise UserError(f"{path}: is of another ONNX file than {folder / 'onnx'}; {again}")
    return report


def _upload(folder: Path, target: Target, recipe: Recipe) -> str:
    from huggingface_hub import HfApi, get_token

    files = [*read_manifest(folder)["files"], MANIFEST, CARD]
    if get_token() is None:
        raise UserError("push: there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="compressft")
    with foreign(f"push: {target.repo!r} could not be uploaded to"):
        repo = api.create_repo(target.repo, private=target.private, exist_ok=True)
        if target.revision is not None:
            api.create_branch(repo.repo_id, branch=target.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=files,
            revision=target.revision,
            commit_message=f"{recipe.name}: {folder.name}/ of recipe {recipe.hash[:19]}",
        )
    return done.commit_url
