"""What gets installed: both packages, recipes and samples with their licence, and nothing named `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import compressft

ROOT = Path(__file__).parents[1]


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
