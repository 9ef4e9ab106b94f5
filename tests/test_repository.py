"""Facts about the repository that nothing else would notice breaking."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moe_forward
from moe_forward.config import Config, load_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PUBLIC_PACKAGES = ("moe_forward", "w4afp8")
LARGEST_FILE_BYTES = 1 << 20


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def direct_dependencies() -> list[Requirement]:
    table = project()
    return [Requirement(text) for text in [*table["dependencies"], *table["optional-dependencies"]["dev"]]]


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make serve" in readme
    assert "make test" in readme


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_direct_dependency_once_for_every_python(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, list[str]] = {}
    for pin in constraints():
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier))
    assert {name: found for name, found in pins.items() if len(found) != 1} == {}
    for wanted in direct_dependencies():
        if wanted.marker is not None and not wanted.marker.evaluate(environment):
            continue
        (pinned,) = pins.get(canonicalize_name(wanted.name), ["absent"])
        version = pinned.removeprefix("==")
        assert pinned.startswith("=="), f"{wanted.name}: {pinned}"
        assert wanted.specifier.contains(version), f"{wanted.name}: {version} is outside {wanted.specifier}"


def test_constraints_leave_the_build_of_torch_to_the_host() -> None:
    (torch,) = (str(pin) for pin in constraints() if pin.name == "torch")
    assert torch == "torch==2.13.0"
    assert not [pin.name for pin in constraints() if re.match(r"nvidia-(?!cutlass)|cuda-|triton$", pin.name)]


def test_dependencies_have_lower_bounds_only() -> None:
    operators = {clause.operator for wanted in direct_dependencies() for clause in wanted.specifier}
    assert operators == {">="}


def test_deepep_is_not_a_dependency() -> None:
    text = json.dumps([project()["dependencies"], project()["optional-dependencies"]])
    assert not re.search(r"deep[-_.]?ep", text, re.IGNORECASE)


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_all_lists_every_public_name_once(package: str) -> None:
    module = importlib.import_module(package)  # ruff's RUF022 sees to the order
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name), name
    imported = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "").partition(".")[0] in PUBLIC_PACKAGES
    }
    assert imported <= set(module.__all__)


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_packages_say_that_they_are_typed(package: str) -> None:
    folder = {"moe_forward": "service", "w4afp8": "kernels"}[package]
    assert (ROOT / folder / package / "py.typed").is_file()


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((ROOT / "helm/moe-forward/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == moe_forward.__version__


def test_the_example_configuration_has_every_key_with_its_default() -> None:
    example = ROOT / "deploy/config.example.yaml"
    assert list(yaml.safe_load(example.read_text())) == list(Config.model_fields)
    assert load_config(example, {}) == Config()
    keys = {}
    comments: list[str] = []
    for line in example.read_text().splitlines():
        if line.startswith("# "):
            comments.append(line[2:])
        else:
            keys[line.partition(":")[0]], comments = " ".join(comments), []
    assert {name: keys[name] for name in Config.model_fields} == {
        name: field.description for name, field in Config.model_fields.items()
    }


def test_prometheus_scrapes_the_metrics_port() -> None:
    document = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())
    (job,) = document["scrape_configs"]
    (static,) = job["static_configs"]
    assert static["targets"] == [f"moe-forward:{Config().metrics_port}"]


def test_the_image_exposes_the_default_ports() -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert f"EXPOSE {Config().port} {Config().metrics_port}\n" in dockerfile


def test_no_large_file_is_kept() -> None:
    files = tracked_files()
    assert files
    assert {str(file) for file in files if file.stat().st_size > LARGEST_FILE_BYTES} == set()


def test_no_file_has_a_leftover_of_a_merge() -> None:
    marker = "<" * 7 + " "
    assert [
        file for file in tracked_files() if file.suffix != ".png" and marker in file.read_text(errors="replace")
    ] == []
