"""README and guide: short, built without a warning, every link and every field that they name is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compressft.recipe.document import read_document
from compressft.recipe.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list:
    """Code blocks of one language, by page and number."""
    found = []
    for page in PAGES:
        texts = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        found += [pytest.param(text, id=f"{page.stem}-{i}") for i, text in enumerate(texts)]
    return found


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.dear
def test_the_guide_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert "whole_words" in page and "reduction_factor" in page and "closeness" in page


def completed(document: dict) -> dict:
    """A block of a recipe as a whole one."""
    base = read_document("banking77-edge")
    if "extends" in document:
        document = {**base, **{key: value for key, value in document.items() if key not in ("extends", "stages")},
                    "stages": base["stages"]}  # fmt: skip
    whole = {**{key: base[key] for key in ("name", "model", "data")}, "stages": [{"name": "one"}], **document}
    if isinstance(whole["data"], dict) and "unlabelled" in whole["data"]:
        whole["stages"] = base["stages"]
    return whole


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_that_pages_show_are_valid(text):
    document = yaml.safe_load(text)
    if isinstance(document, list):
        feeds = {feed.get("data") for feed in document[0]["feeds"]}
        document = {"stages": document, "data": {name: {"train": "x.jsonl"} for name in feeds}}
    elif "passes" in document:
        document = {"stages": [{"name": "one", **document}]}
    elif "analyses" in document:
        document = {**document, "stages": [{"name": "target"}]}
    parse_recipe(completed(document))
