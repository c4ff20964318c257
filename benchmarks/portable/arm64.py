"""An emulated arm64: Debian's python, the aarch64 wheels of our own versions, a /proc/cpuinfo that fits."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.portable.lack import Lack, done, installed

# What python3.11 of Debian 12 loads.
DEBIAN = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "zlib1g",
    "libexpat1",
    "libssl3",
    "libffi8",
    "libbz2-1.0",
    "liblzma5",
    "libsqlite3-0",
    "libuuid1",
    "libtinfo6",
    "libncursesw6",
    "libreadline8",
    "libcrypt1",
    "libnsl2",
    "libtirpc3",
    "libdb5.3",
)
PYTHON = "3.11"
# Of a wheel's name; pip takes none of the older ones by itself.
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# onnxruntime's processor library reads it at import, and ends the process where it is another architecture's.
CPUINFO = "\n".join(
    f"""processor\t: {number}
BogoMIPS\t: 100.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""
    for number in range(2)
)


@dataclass(frozen=True)
class Place:
    """A folder with `root` (Debian's files), `site` (wheels) and `cpuinfo`; `version` is onnxruntime's."""

    folder: Path
    emulator: str
    version: str

    def command(self, model: str) -> tuple[str, ...]:
        """The interpreter on that processor."""
        python = self.folder / "root" / "usr" / "bin" / f"python{PYTHON}"
        return (*self.mounted(), self.emulator, "-cpu", model, str(python))

    def mounted(self) -> tuple[str, ...]:
        """What runs the command behind it with our /proc/cpuinfo, in a mount namespace of its own."""
        own = () if os.geteuid() == 0 else ("--map-root-user",)
        script = 'mount --bind "$0" /proc/cpuinfo && exec "$@"'
        return ("unshare", *own, "--mount", "sh", "-c", script, str(self.folder / "cpuinfo"))

    def environment(self) -> Mapping[str, str]:
        """Where it finds its loader and its packages."""
        return {"QEMU_LD_PREFIX": str(self.folder / "root"), "PYTHONPATH": str(self.folder / "site")}


def prepare(folder: Path) -> Place:
    """Fill the folder, once for each version of onnxruntime.

    Raises:
        Lack: the emulator, Debian 12's package tools, or a package.
    """
    emulator = installed("qemu-aarch64-static", "qemu-aarch64", of="qemu-user-static")
    installed("unshare", of="util-linux")
    place = Place((folder / f"arm64-{version('onnxruntime')}").resolve(), emulator, version("onnxruntime"))
    if not (place.folder / "cpuinfo").is_file():
        shutil.rmtree(place.folder, ignore_errors=True)
        _debian(place.folder)
        _wheels(place.folder / "site")
        (place.folder / "cpuinfo").write_text(CPUINFO, encoding="ascii")
    done([*place.mounted(), "true"], "the right to mount (root, or user namespaces)")
    return place


def _debian(folder: Path) -> None:
    what = "Debian 12's arm64 packages"
    for tool in ("apt-get", "dpkg"):
        installed(tool, of=what)
    lists, debs = folder / "lists", folder / "debs"
    for path in (lists / "partial", debs):
        path.mkdir(parents=True)
    options = [
        "APT::Architecture=arm64",
        "APT::Architectures=arm64",
        f"Dir::State::Lists={lists}",
        "Dir::State::status=/dev/null",
        "Dir::Cache::pkgcache=",
        "Dir::Cache::srcpkgcache=",
        "APT::Sandbox::User=root",
    ]
    apt = ["apt-get", *(part for option in options for part in ("-o", option))]
    done([*apt, "update"], what)
    done([*apt, "download", *DEBIAN], what, debs)
    for deb in sorted(debs.glob("*.deb")):
        done(["dpkg", "-x", str(deb), str(folder / "root")], what)


def _wheels(site: Path) -> None:
    wanted = [f"{name}=={version(name)}" for name in ("numpy", "onnxruntime")]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", "--target", str(site)]
    for name in PLATFORMS:
        command += ["--platform", name]
    done([*command, *wanted, "flatbuffers", "protobuf", "packaging"], f"arm64 wheels of {' and '.join(wanted)}")
    if not (site / "onnxruntime").is_dir():
        raise Lack(f"arm64 wheels of {' and '.join(wanted)}")
