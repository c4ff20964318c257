"""Imports: the package loads fast and alone, has few public names, and its parts import one way only."""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compressft

ROOT = Path(__file__).parents[1]
HEAVY = ("triton", "bitsandbytes", "onnxruntime", "matplotlib", "transformers")
PROBE = f"""
import json, sys, time
started = time.perf_counter()
import torch
between = time.perf_counter()
loaded = set(sys.modules)
import compressft
seconds = time.perf_counter() - between
new = set(sys.modules) - loaded
print(json.dumps([seconds, between - started, [n for n in {HEAVY!r} if n in new], torch.cuda.is_initialized()]))
"""


def python(*arguments: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), str(path / "kernels")])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=path)


def test_import_is_fast_and_loads_nothing_heavy():
    done = python("-c", PROBE)
    assert done.returncode == 0, done.stderr
    seconds, of_torch, heavy, initialised = json.loads(done.stdout)
    assert seconds < 1.0
    assert of_torch > 0
    assert heavy == []
    assert not initialised


def test_command_line_starts_without_the_heavy_ones():
    done = python("-c", f"import sys, compressft.cli; print([n for n in {('torch', *HEAVY)!r} if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_mistakes_in_recipes_and_data_are_found_before_seconds_of_imports():
    slow = ("peft", "torch._dynamo", *HEAVY)
    done = python("-c", f"import sys, compressft.run.flow; print([n for n in {slow!r} if n in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_few_and_resolve():
    assert len(compressft.__all__) <= 12
    assert sorted(set(compressft.__all__)) == sorted(compressft.__all__)
    for name in compressft.__all__:
        assert callable(getattr(compressft, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compressft.nothing  # noqa: B018


def test_public_names_mean_the_same_after_their_modules_are_imported():
    """A public name that is also a module's would be replaced by it on import."""
    before = {name: getattr(compressft, name) for name in compressft.__all__}
    for module in ("adapters.named_adapters", "errors", "model.load", "recipe.recipe", "run.flow", "transform"):
        importlib.import_module(f"compressft.{module}")
    assert all(getattr(compressft, name) is value for name, value in before.items())


# Directions.


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return python("-c", code, path=root)


def test_import_contracts_hold():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken." in done.stdout


VIOLATIONS = {
    "compressft/tasks/task.py": "import compressft.export.flow",
    "compressft/cli.py": "import compressft",
    "compressft/methods/full.py": "import compressft.data.rows",
    "compressft/model/anatomy.py": "import transformers",
    "compressft/run/report/numbers.py": "import compressft.recipe.recipe",
    "kernels/compressft_kernels/reference/masked.py": "import transformers",
}


def test_every_import_contract_can_break(tmp_path):
    for name in ("compressft", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("samples", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, line in VIOLATIONS.items():
        with (tmp_path / name).open("a") as file:
            file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert " 0 kept, " in done.stdout, done.stdout


def test_a_new_module_must_be_given_its_place(tmp_path):
    for name in ("compressft", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("samples", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "compressft" / "newcomer.py").write_text('"""New."""\n')
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "newcomer" in done.stdout


def imported(path: Path) -> set[str]:
    """Top-level names of all packages that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_triton_is_imported_in_its_own_files_alone():
    files = [*(ROOT / "compressft").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert any("torch" in imported(path) for path in files)
    assert [str(p) for p in files if "triton" in imported(p) and not p.stem.endswith("_triton")] == []


def test_no_folder_shadows_the_kernels_package():
    """A package named `kernels` on the path would shadow Hugging Face's, and transformers would not import."""
    found = [
        folder for part in ("compressft", "kernels", "tests", "benchmarks") for folder in (ROOT / part).rglob("kernels")
    ]
    assert not [folder for folder in (ROOT / "kernels", *found) if (folder / "__init__.py").exists()]
