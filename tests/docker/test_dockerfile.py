"""The images, as far as it can be told without an engine: docker/prove.sh builds and runs the one for CPUs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import moe_forward
from moe_forward.config import Config
from moe_forward.main import _parser
from w4afp8.library import ABI_VERSION, load

from .dockerfile import Instruction, Stage, read

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
RUNTIMES = ("runtime-cpu", "runtime-gpu")
ARGUMENTS, STAGES = read(DOCKERFILE)


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file or folder from the builder; the last line that matches counts."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        folders = [*Path(path).parents, Path(path)]
        if any(fnmatch(str(folder), pattern) or fnmatch(folder.name, pattern) for folder in folders if folder.name):
            verdict = not line.startswith("!")
    return verdict


def copies(stage: Stage) -> list[Instruction]:
    """COPY instructions whose source is the repository."""
    return [copy for copy in stage.all("COPY") if "from" not in copy.flags]


def test_what_is_copied_from_the_repository_exists_and_reaches_the_builder() -> None:
    sources = [word for stage in STAGES.values() for copy in copies(stage) for word in copy.words[:-1]]
    assert len(sources) >= 8
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source


def test_a_kernel_library_built_outside_never_reaches_the_builder() -> None:
    assert ignored("kernels/w4afp8/lib/libw4afp8.so")
    assert ignored("service/moe_forward/__pycache__/main.cpython-312.pyc")
    assert not ignored("kernels/w4afp8/csrc/int4.cu")


def test_stages_take_from_stages_before_them() -> None:
    seen: list[str] = []
    for stage in STAGES.values():
        taken = [copy.flags["from"] for copy in stage.all("COPY") if "from" in copy.flags]
        taken += re.findall(r"from=(\w[\w-]*)", " ".join(run.text for run in stage.all("RUN")))
        taken += [stage.base] if "$" not in stage.base and stage.base != "scratch" else []
        assert set(taken) <= set(seen), f"{stage.name} takes from {taken}"
        seen.append(stage.name)


def test_base_images_are_arguments_so_that_a_digest_can_be_given() -> None:
    bases = {stage.base for stage in STAGES.values()} - set(STAGES) - {"scratch"}
    assert bases == {f"${{{name}}}" for name in ARGUMENTS}
    for name, image in ARGUMENTS.items():
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", image), f"{name}: {image} names no version"


def test_packages_come_by_their_hashes_and_nothing_comes_with_them() -> None:
    installs = [line for stage in STAGES.values() for run in stage.all("RUN") for line in run.text.split("&&")]
    installs = [line for line in installs if "pip install" in line or "pip wheel" in line]
    assert len(installs) >= 7
    for line in installs:
        assert "--no-deps" in line, line
        files = re.findall(r"-r (\S+)", line)
        if files and files != ["torch.txt"]:
            assert "--require-hashes" in line, line
        elif not files:
            assert re.search(r"--wheel-dir|/(deepep-)?wheels/", line), line


@pytest.mark.parametrize("target", RUNTIMES)
def test_the_image_runs_the_service_as_nobody_in_particular(target: str) -> None:
    stage = STAGES[target]
    assert stage.last("USER").text == "10001:0"
    assert stage.last("EXPOSE").text == f"{Config().port} {Config().metrics_port}"
    assert stage.last("STOPSIGNAL").text == "SIGTERM"
    assert stage.last("WORKDIR").text == stage.environment["HOME"]
    tini, separator, *command = stage.last("ENTRYPOINT").listed
    assert (tini, separator) == ("tini", "--"), "process 1 must reap what Ray leaves behind"
    assert command[0] == "moe-forward"
    options = vars(_parser().parse_args([*command[1:], *stage.last("CMD").listed]))
    assert options["host"] == "0.0.0.0"


@pytest.mark.parametrize("target", RUNTIMES)
def test_the_health_check_fails_where_nobody_listens(target: str) -> None:
    stage = STAGES[target]
    assert stage.environment["MOE_FORWARD_HEALTH_URL"] == f"http://127.0.0.1:{Config().port}/v2/health/live"
    _, _, command = stage.last("HEALTHCHECK").text.partition("CMD ")
    words = Instruction("CMD", command).listed
    url = "http://127.0.0.1:9/v2/health/live"
    done = subprocess.run(
        [sys.executable, *words[1:]], env={"MOE_FORWARD_HEALTH_URL": url}, stderr=subprocess.DEVNULL, check=False
    )
    assert words[0] == "python"
    assert done.returncode == 1


@pytest.mark.parametrize("target", RUNTIMES)
def test_labels_say_the_package_s_version(target: str) -> None:
    stage = STAGES[target]
    assert f"VERSION={moe_forward.__version__}" in [argument.text for argument in stage.all("ARG")]
    assert 'org.opencontainers.image.version="${VERSION}"' in stage.last("LABEL").text


def test_every_run_is_a_shell_script_that_parses() -> None:
    scripts = [re.sub(r"--mount=\S+", "", run.text) for stage in STAGES.values() for run in stage.all("RUN")]
    assert len(scripts) >= 10
    for script in scripts:
        done = subprocess.run(["/bin/sh", "-n", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}: {done.stderr}"


def test_the_kernel_library_is_where_the_gpu_image_looks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (build,) = [run for run in STAGES["cuda-build"].all("RUN") if "build.py" in run.text]
    command = build.text.replace("/opt/build/bin/python", sys.executable).replace("/opt/kernels", str(tmp_path))
    # Compiling takes minutes and is CI's `make kernel`: here nvcc is missing, and the command must say just that.
    environment = {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert "nvcc: not found" in done.stderr
    output = re.search(r"--output (\S+)", build.text)
    assert output is not None
    assert STAGES["runtime-gpu"].environment["W4AFP8_LIBRARY"] == output.group(1)
    assert any("/opt/kernels" in copy.words for copy in STAGES["runtime-gpu"].all("COPY"))
    built = ROOT / "kernels/w4afp8/lib/libw4afp8.so"
    if built.is_file():
        monkeypatch.setenv("W4AFP8_LIBRARY", str(built))
        assert load().path == built
        assert ABI_VERSION > 0


def test_the_stand_in_for_nvcc_says_the_version_and_refuses_to_compile(tmp_path: Path) -> None:
    stand_in = tmp_path / "nvcc"
    shutil.copy(ROOT / "docker/deepep/nvcc", stand_in)
    (tmp_path / "nvcc.version").write_text("Cuda compilation tools, release 13.0, V13.0.88\n")
    environment = {"PATH": os.environ["PATH"], "EP_JIT_CACHE_DIR": "/opt/deepep/kernels"}
    said = subprocess.run([stand_in, "--version"], env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"release (\d+\.\d+)", said.stdout)
    refused = subprocess.run(
        [stand_in, "kernel.cu", "-cubin"], env=environment, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "/opt/deepep/kernels" in refused.stderr
    assert "docker/README.md" in refused.stderr


def test_deepep_finds_its_tools_and_kernels_in_the_gpu_image() -> None:
    environment = STAGES["runtime-gpu"].environment
    made = " ".join(one.text for one in STAGES["deepep-tools"].instructions)
    for tool in ("nvcc", "nvcc.version"):
        assert f"{environment['CUDA_HOME']}/bin/{tool}" in made
    assert f"cuobjdump {environment['CUDA_HOME']}/bin/" in made
    assert f"--from=kernels / {environment['EP_JIT_CACHE_DIR']}/" in made


@pytest.mark.parametrize(
    ("linter", "files"),
    [
        ("hadolint", ["docker/Dockerfile"]),
        (
            "shellcheck",
            ["docker/prove.sh", "docker/deepep/nvcc", "deploy/ray/start-head.sh", "deploy/ray/start-worker.sh"],
        ),
    ],
)
def test_linters_find_nothing(linter: str, files: list[str]) -> None:
    beside_python = Path(sys.executable).parent / linter
    program = shutil.which(linter, path=f"{beside_python.parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{linter} is not installed; the dev dependencies have it")
    options = ["--external-sources"] if linter == "shellcheck" else []
    done = subprocess.run([program, *options, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
