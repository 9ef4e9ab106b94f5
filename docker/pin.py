"""Pin what the images install, every file by its hash: python docker/pin.py (needs uv and the package index).

Versions are those of constraints.txt; what torch for CUDA brings itself (nvidia-*, triton) is pinned here alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_31"

EXTRAS = ("tracing",)
"""Of the package's optional dependencies, what the images have, as far as pyproject.toml knows them."""

NCCL = "nvidia-nccl-cu13==2.30.4"
"""DeepEP needs a newer NCCL than torch asks for; what torch was linked with is older and of the same interface."""

BUILD = ("hatchling", "ninja", "setuptools", "wheel")
"""What builds wheels: this package's, and DeepEP's."""

HEADERS = "nvidia-cutlass"
"""Headers for the kernel library; what it depends on is for its Python."""


def main() -> None:
    """Write the three requirements files beside this one."""
    with tempfile.TemporaryDirectory() as folder:
        override = Path(folder) / "override.txt"
        override.write_text(f"{NCCL}\n")
        build = Path(folder) / "build.in"
        build.write_text("\n".join(BUILD) + "\n")
        extras = [option for extra in EXTRAS if knows_extra(extra) for option in ("--extra", extra)]
        gpu = compiled([str(ROOT / "pyproject.toml"), *extras, "--override", str(override)])
        kept_by_torch = [name for name in names(gpu) if brought_by_torch(name)]
        without = [option for name in kept_by_torch for option in ("--no-emit-package", name)]
        write("requirements-gpu.txt", gpu, f"With torch for CUDA, and {NCCL}")
        cpu = compiled([str(ROOT / "pyproject.toml"), *extras, *without])
        write("requirements-cpu.txt", cpu, "Without torch, whose build for CPUs is on an index of its own")
        headers = Path(folder) / "headers.in"
        headers.write_text(f"{HEADERS}\n")
        builds = compiled([str(build)]) + compiled([str(headers), "--no-deps"])
        write("requirements-build.txt", builds, "What builds the wheels and the kernel library")


def brought_by_torch(name: str) -> bool:
    """Whether only torch for CUDA wants it, torch itself included."""
    return re.match(r"nvidia-|cuda-|triton$|torch$", name) is not None


def names(requirements: str) -> list[str]:
    """The packages that a requirements file pins."""
    return re.findall(r"^([a-z0-9.-]+)==", requirements, re.MULTILINE)


def knows_extra(extra: str) -> bool:
    """Whether pyproject.toml has such optional dependencies."""
    return re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) is not None


def compiled(arguments: list[str]) -> str:
    """Resolve for the images' Python, held by constraints.txt."""
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes"]
    command += ["--python-version", PYTHON, "--python-platform", PLATFORM, "-c", str(ROOT / "constraints.txt")]
    return subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout


def write(name: str, requirements: str, what: str) -> None:
    """Write one file, with a line that says how it came about."""
    made = f"Made by `python docker/pin.py` for Python {PYTHON}; installed with --no-deps --require-hashes."
    head = f"# {what}.\n# {made}\n"
    (DOCKER / name).write_text(head + requirements)
    print(f"{name}: {len(names(requirements))} packages")


if __name__ == "__main__":
    sys.exit(main())
