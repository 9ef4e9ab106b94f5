"""What the images install is what constraints.txt says, by hash."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from moe_forward.exchange.gpu_checks import NCCL_BEYOND, NCCL_FIRST

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PYTHON = {"python_version": "3.12", "python_full_version": "3.12.0"}
FILES = ("requirements-cpu.txt", "requirements-gpu.txt", "requirements-build.txt")


def pins(path: Path) -> dict[str, str]:
    """Version by name, of the lines that hold for the images' Python."""
    text = re.sub(r"\\\n\s*--hash=\S+", "", path.read_text())
    requirements = [Requirement(line.strip()) for line in text.splitlines() if line.strip() and line[0] != "#"]
    return {
        canonicalize_name(one.name): str(one.specifier).removeprefix("==")
        for one in requirements
        if one.marker is None or one.marker.evaluate(PYTHON)
    }


def wanted() -> list[str]:
    """Names of the package's own dependencies."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = table["optional-dependencies"].get("tracing", [])
    return [canonicalize_name(Requirement(text).name) for text in [*table["dependencies"], *extras]]


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_constraints(name: str) -> None:
    constraints = pins(ROOT / "constraints.txt")
    found = pins(ROOT / "docker" / name)
    assert found
    different = {key: version for key, version in found.items() if constraints.get(key, version) != version}
    assert different == {}, "run python docker/pin.py"


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_known_by_its_hash(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    blocks = re.findall(r"^\S+==\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE)
    assert len(blocks) == len(pins(ROOT / "docker" / name))


@pytest.mark.parametrize("name", ["requirements-cpu.txt", "requirements-gpu.txt"])
def test_what_the_package_depends_on_is_installed_and_pinned_by_the_constraints(name: str) -> None:
    constraints, found = pins(ROOT / "constraints.txt"), pins(ROOT / "docker" / name)
    missing = [one for one in wanted() if one not in found and not (one == "torch" and "cpu" in name)]
    assert missing == [], "run python docker/pin.py"
    unknown = [one for one in found if one not in constraints and not re.match(r"nvidia-|cuda-|triton$", one)]
    assert unknown == [], "constraints.txt lacks what the images install"


def test_only_the_gpu_image_has_cuda_with_an_nccl_that_deepep_takes() -> None:
    cpu, gpu = (pins(ROOT / "docker" / name) for name in FILES[:2])
    assert [one for one in cpu if re.match(r"nvidia-|cuda-|triton$|torch$", one)] == []
    nccl = Version(gpu["nvidia-nccl-cu13"])
    assert NCCL_FIRST <= nccl.major * 10000 + nccl.minor * 100 + nccl.micro < NCCL_BEYOND
    assert set(cpu) < set(gpu)
