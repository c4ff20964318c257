"""The notebook of the first five minutes runs from top to bottom, on a few rows, in a kernel of its own."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "first_five_minutes.ipynb"
# Before all else: recipes are read as `--smoke` reads them.
FEW_ROWS = """
from compressft.recipe import recipe as _recipes
_read = _recipes.load_recipe
_recipes.load_recipe = lambda *given: _recipes.smoke(_read(*given))
"""
# After all else.
PROOF = "assert len(answers) == 2 and set(answers) <= set(KINDS) and size['onnx'] < size['base_onnx'] / 3"


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            compile(cell.source, NOTEBOOK.name, "exec")


@pytest.mark.dear
def test_the_notebook_runs(tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = nbformat.v4.new_code_cell
    notebook.cells = [code(FEW_ROWS), *notebook.cells, code(PROOF)]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "accuracy: dense" in said and (tmp_path / "runs" / "questions" / "onnx" / "model.onnx").is_file()
