"""triton is imported in `*_triton.py` alone, and those only where a kernel is launched."""

import ast
import subprocess
import sys
from pathlib import Path

import compressft_kernels

FOLDER = Path(compressft_kernels.__file__).parent


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def test_only_files_named_so_import_triton():
    files = sorted(FOLDER.rglob("*.py"))
    assert any(file.name.endswith("_triton.py") for file in files)
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if any(name.split(".")[0] == "triton" for name in imported(node)):
                assert file.name.endswith("_triton.py"), f"{file.relative_to(FOLDER)}:{node.lineno}"
        if not file.name.endswith("_triton.py"):
            for node in tree.body:
                assert not any(name.endswith("_triton") for name in imported(node)), file.relative_to(FOLDER)


def test_importing_the_package_loads_no_triton_module_of_ours():
    ours = "m.startswith('compressft') and m.endswith('_triton')"
    code = f"import sys, compressft_kernels; print([m for m in sys.modules if {ours}])"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(FOLDER.parent)}
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
