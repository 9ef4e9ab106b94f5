from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from w4afp8.build import BuildError, build, find_cutlass, find_nvcc, main

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on PATH")

ANSWER = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
KERNEL = "__global__ void double_all(float* x) { x[threadIdx.x] *= 2; }\n"
# 2048 threads of an SM leave 32 registers to each, and 64 values live across the loop.
SPILLING = """
__global__ void __launch_bounds__(1024, 2) greedy(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  for (int n = 0; n < 99; ++n) {
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 1) % 64] + x[n];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i];
}
"""


def write_sources(folder: Path, **sources: str) -> Path:
    folder.mkdir()
    for name, text in sources.items():
        (folder / f"{name}.cu").write_text(text)
    return folder


@needs_nvcc
def test_files_are_compiled_linked_and_reported(tmp_path: Path) -> None:
    source = write_sources(tmp_path / "csrc", answer=ANSWER, kernel=KERNEL)
    output = tmp_path / "lib" / "libtest.so"
    table = build(output, find_nvcc(), [], source)
    assert "double_all" in table
    assert ctypes.CDLL(str(output)).answer() == 42
    assert [path.name for path in output.parent.iterdir()] == ["libtest.so"]


@needs_nvcc
def test_spilling_kernel_fails_the_build_by_name_and_leaves_the_old_library(tmp_path: Path) -> None:
    source = write_sources(tmp_path / "csrc", greedy=SPILLING)
    output = tmp_path / "libtest.so"
    output.write_text("old")
    with pytest.raises(BuildError, match=r"greedy.*bytes of registers spilled"):
        build(output, find_nvcc(), [], source)
    assert output.read_text() == "old"


@needs_nvcc
def test_allowed_faults_are_listed_and_the_library_is_written(tmp_path: Path) -> None:
    source = write_sources(tmp_path / "csrc", greedy=SPILLING)
    listing = build(tmp_path / "libtest.so", find_nvcc(), [], source, allow_faults=True)
    assert "bytes of registers spilled" in listing.splitlines()[0]
    assert (tmp_path / "libtest.so").is_file()


@needs_nvcc
def test_compiler_error_is_shown(tmp_path: Path) -> None:
    source = write_sources(tmp_path / "csrc", broken="int x = nonsense;\n")
    with pytest.raises(BuildError, match=r'(?s)broken\.cu: exit status.*"nonsense" is undefined'):
        build(tmp_path / "libtest.so", find_nvcc(), [], source)


def test_folder_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="found none"):
        build(tmp_path / "libtest.so", Path("nvcc"), [], tmp_path)


def test_missing_nvcc_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="install the CUDA toolkit"):
        find_nvcc()


def test_nvcc_of_cuda_home_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == nvcc


def test_cutlass_folder_is_taken_as_given_or_from_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cutlass").mkdir()
    (tmp_path / "cutlass" / "cutlass.h").touch()
    assert find_cutlass(tmp_path) == tmp_path
    monkeypatch.setenv("W4AFP8_CUTLASS_INCLUDE", str(tmp_path))
    assert find_cutlass() == tmp_path


def test_cutlass_folder_without_headers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"--cutlass says .* cutlass/cutlass\.h is not in that folder"):
        find_cutlass(tmp_path)


def test_command_prints_the_error_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cutlass", str(tmp_path)]) == 1
    assert "w4afp8.build: CUTLASS headers" in capsys.readouterr().err
