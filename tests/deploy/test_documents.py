"""Whatever the operator's documents and scripts name is there: commands, flags, keys, files, targets, metrics."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from moe_forward.config import Config
from moe_forward.main import _parser
from moe_forward.metrics import Metrics

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "deploy/OPERATIONS.md", ROOT / "deploy/ray/README.md", ROOT / "docker/README.md"]
SCRIPTS = sorted((ROOT / "deploy/ray").glob("*.sh"))
UNIT = ROOT / "deploy/systemd/moe-forward.service"
ASK_RAY = """
import json
from ray.scripts.scripts import cli
options = [option for parameter in cli.commands["start"].params for option in parameter.opts]
print(json.dumps([list(cli.commands), options]))
"""
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[list[str]]:
    """Every command line of console blocks and of inline code, by words; comments and what follows `&&` cut off."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]*)`", prose) if re.search(r"\s", code)]
    for line in lines:
        for part in re.split(r"\s(?:&&|&|;|\|\|)\s|;\s*do\s", re.sub(r"\s#.*", "", line)):
            words = shlex.split(part) if part.count("'") % 2 == 0 else part.split()
            while words and ("=" in words[0] or words[0] == "do"):
                words = words[1:]
            if words and words[0] != "#":
                yield words


def served_flags() -> dict[str, set[str]]:
    """Flags of each subcommand of moe-forward."""
    (choices,) = [action.choices for action in _parser()._actions if isinstance(action.choices, dict)]
    return {name: {*command._option_string_actions} for name, command in choices.items()}


def flags(words: list[str]) -> set[str]:
    """Long options among the words."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


@by_name
def test_the_command_line_knows_every_flag(document: Path) -> None:
    known = served_flags()
    found = [words for words in commands(document.read_text()) if words[0] == "moe-forward"]
    assert found
    for words in found:
        assert words[1] in known, words
        assert flags(words) <= known[words[1]], words


def test_options_behind_an_image_are_those_of_serve() -> None:
    runs = [words for words in commands((ROOT / "docker/README.md").read_text()) if words[:2] == ["docker", "run"]]
    assert len(runs) == 3
    for words in runs:
        (image,) = [index for index, word in enumerate(words) if re.match(r"moe-forward:\d", word)]
        assert flags(words[image:]) <= served_flags()["serve"], words


def test_ray_knows_every_flag_and_command() -> None:
    # In a process of its own: what imports Ray decides for the whole process whether Ray asks for tokens.
    asked = subprocess.run([sys.executable, "-c", ASK_RAY], capture_output=True, text=True, check=True)
    ray_commands, known = (set(names) for names in json.loads(asked.stdout))
    text = "\n".join(path.read_text() for path in SCRIPTS)
    used = set(re.findall(r"--[a-z][a-z-]+", re.sub(r"^\s*#.*|^: .*", "", text, flags=re.MULTILINE)))
    assert len(used) >= 14
    assert used <= known
    named = {words[1] for path in DOCUMENTS for words in commands(path.read_text()) if words[0] == "ray"}
    assert named
    assert named <= ray_commands


@by_name
def test_files_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    linked = {document.parent / target for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)}
    named = set(re.findall(r"(?<![\w/.-])((?:deploy|docker|helm|tests|service|kernels)/[\w./-]*\w)", text))
    assert linked | {ROOT / name for name in named}
    missing = [str(path) for path in linked | {ROOT / name for name in named} if not path.exists()]
    assert missing == []


@by_name
def test_make_targets_and_image_targets_exist(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    stages = re.findall(r" AS ([\w-]+)$", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    arguments = re.findall(r"^ARG (\w+)", (ROOT / "docker/Dockerfile").read_text(), re.MULTILINE)
    for words in commands(document.read_text()):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        if words[:2] == ["docker", "build"]:
            assert words[words.index("--target") + 1] in stages, words
            for flag, value in itertools.pairwise(words):
                if flag == "--build-context":
                    assert value.partition("=")[0] in stages, words
                if flag == "--build-arg":
                    assert value.partition("=")[0] in arguments, words


@by_name
def test_configurations_are_valid(document: Path) -> None:
    for block in blocks(document.read_text(), "yaml"):
        Config.model_validate(yaml.safe_load(block))


@by_name
def test_keys_metrics_and_chart_values_that_are_named_exist(document: Path) -> None:
    text = document.read_text()
    keys = set(
        re.findall(r"`((?:max|drain|start|step|slab|admin|api|remote|ray|allow|rank|activation)_[a-z_]+)`", text)
    )
    assert keys <= {*Config.model_fields}
    registry = CollectorRegistry()
    Metrics(registry, expert_metrics=True, tracing=True)
    exposed = {family.name for family in registry.collect()}
    named = {re.sub(r"_total$", "", name) for name in re.findall(r"moe_forward_[a-z_]+", text)}
    assert named <= exposed


@pytest.mark.parametrize("path", ["/v1/ranks", "/v1/drain", "/v2/health/live", "/v2/health/ready"])
def test_routes_that_are_named_exist(path: str) -> None:
    assert path in (ROOT / "deploy/OPERATIONS.md").read_text()
    sources = "\n".join(file.read_text() for file in (ROOT / "service/moe_forward/api").glob("*.py"))
    assert f'"{path}"' in sources


def test_the_unit_stops_later_than_the_service_drains_and_tells_it_alone() -> None:
    unit = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"[A-Z]\w+=", line))
    assert int(unit["TimeoutStopSec"]) > Config().drain_timeout_seconds + 30
    assert unit["KillMode"] == "mixed"
    (_, command, *options) = unit["ExecStart"].split()
    assert flags(options) <= served_flags()[command]


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("no systemd-analyze on this machine")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/moe-forward/bin/moe-forward", "/bin/true"))
    done = subprocess.run([systemd, "verify", str(unit)], capture_output=True, text=True, check=False)
    assert [line for line in done.stderr.splitlines() if UNIT.name in line] == []
    assert done.returncode == 0


def test_the_scripts_refuse_to_start_ray_without_a_token(tmp_path: Path) -> None:
    empty = tmp_path / "token"
    empty.touch()
    for environment, expected in (({}, "must name the file"), ({"RAY_AUTH_TOKEN_PATH": str(empty)}, "no token in it")):
        for script in ("start-head.sh", "start-worker.sh"):
            done = subprocess.run(
                ["/bin/bash", str(ROOT / "deploy/ray" / script), "127.0.0.1", "127.0.0.1"],
                env={"PATH": "/usr/bin:/bin", **environment},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode != 0
            assert expected in done.stderr


def test_the_scripts_hand_ray_what_the_document_says(tmp_path: Path) -> None:
    fake = tmp_path / "ray"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$RAY_AUTH_MODE" "$@"\n')
    fake.chmod(0o755)
    token = tmp_path / "token"
    token.write_text("secret\n")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_AUTH_TOKEN_PATH": str(token), "CPUS": "3"}
    for script, arguments in (("start-head.sh", ["10.0.0.1", "0"]), ("start-worker.sh", ["10.0.0.1", "10.0.0.2", "0"])):
        done = subprocess.run(
            ["/bin/bash", str(ROOT / "deploy/ray" / script), *arguments],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        mode, *words = done.stdout.splitlines()
        given = dict(itertools.pairwise(words))
        assert mode == "token"
        assert given["--num-cpus"] == "3"
        assert given["--num-gpus"] == "0"
        assert given["--node-ip-address"] == arguments[-2]
        assert "secret" not in done.stdout
        ports = {int(value) for name, value in given.items() if name.endswith("-port")}
        assert ports <= {*range(6379, 6386), 10002, 10999}
