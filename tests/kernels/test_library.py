from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import w4afp8.library as library
from w4afp8.library import (
    GateArguments,
    GroupedGemmArguments,
    KernelError,
    Library,
    LibraryMismatch,
    LibraryNotBuilt,
    QuantizeArguments,
    RoutesArguments,
    SliceArguments,
    load,
)

PACKAGE = Path(library.__file__).parent
BUILT = Path(os.environ.get("W4AFP8_LIBRARY") or PACKAGE / "lib" / "libw4afp8.so")
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "W4AFP8GroupedGemm": GroupedGemmArguments,
    "W4AFP8Quantize": QuantizeArguments,
    "W4AFP8Slice": SliceArguments,
    "W4AFP8Gate": GateArguments,
    "W4AFP8Routes": RoutesArguments,
}

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
needs_library = pytest.mark.skipif(not BUILT.is_file(), reason=f"needs {BUILT.name}: python -m w4afp8.build")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without GPU")


def compile_cpp(folder: Path, source: str, *options: str) -> Path:
    (folder / "source.cpp").write_text(source)
    output = folder / "compiled"
    command = ["c++", "-std=c++17", "-I", str(PACKAGE / "csrc"), *options, "-o", str(output), "source.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return output


def fake_library(
    folder: Path, version: int = library.ABI_VERSION, extra_bytes: int = 0, quantize: str = "return 0;"
) -> Path:
    """A library with the interface of w4afp8.h, or almost."""
    source = f"""
#include "w4afp8.h"
int32_t w4afp8_abi_version(void) {{ return {version}; }}
int64_t w4afp8_struct_bytes(int32_t which) {{
  const int64_t bytes[] = {{sizeof(W4AFP8GroupedGemm), sizeof(W4AFP8Quantize), sizeof(W4AFP8Slice),
                           sizeof(W4AFP8Gate), sizeof(W4AFP8Routes)}};
  return {extra_bytes} + bytes[which];
}}
int w4afp8_grouped_gemm(const struct W4AFP8GroupedGemm* a) {{ return (int)(a->n + a->group); }}
int w4afp8_quantize(const struct W4AFP8Quantize* a) {{ {quantize} }}
int w4afp8_slice(const struct W4AFP8Slice* a) {{ return (int)(a->k + a->bits); }}
int w4afp8_gate(const struct W4AFP8Gate* a) {{ return (int)(a->experts + a->top_k + a->scaling_factor); }}
int w4afp8_copy(const struct W4AFP8Copy* c, int64_t count, int32_t, void*) {{
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; ++i) bytes += c[i].bytes + ((char*)c[i].to - (char*)c[i].from);
  return (int)bytes;
}}
int w4afp8_routes(const struct W4AFP8Routes* a) {{ return (int)(a->top_k + a->wide); }}
const char* w4afp8_error_string(int code) {{ return "told so"; }}
"""
    return compile_cpp(folder, source, "-shared", "-fPIC")


@needs_compiler
def test_structs_have_the_sizes_and_offsets_of_the_header(tmp_path: Path) -> None:
    lines = [
        f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));'
        for name, struct in STRUCTS.items()
        for field in struct._fields_
    ] + [f'printf("{name} %zu\\n", sizeof({name}));' for name in STRUCTS]
    source = '#include <cstddef>\n#include <cstdio>\n#include "w4afp8.h"\nint main() {' + "\n".join(lines) + "}\n"
    printed = subprocess.run([compile_cpp(tmp_path, source)], check=True, capture_output=True, text=True).stdout
    expected = {
        f"{name}.{field[0]}": getattr(struct, field[0]).offset
        for name, struct in STRUCTS.items()
        for field in struct._fields_
    } | {name: ctypes.sizeof(struct) for name, struct in STRUCTS.items()}
    assert {line.split()[0]: int(line.split()[1]) for line in printed.splitlines()} == expected


def test_constants_are_those_of_the_header() -> None:
    header = (PACKAGE / "csrc" / "w4afp8.h").read_text()
    names = ("BF16", "F16", "F32", "PLAIN", "SWIGLU", "AS_IS", "HALVES", "INTERLEAVED", "SIGMOID", "SOFTMAX")
    found = dict(re.findall(rf"\bW4AFP8_({'|'.join(names)}) = (\d+)", header))
    assert {name: int(value) for name, value in found.items()} == {name: getattr(library, name) for name in names}
    assert f"#define W4AFP8_ABI_VERSION {library.ABI_VERSION}\n" in header


def test_absent_library_is_said_with_the_command_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("W4AFP8_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(LibraryNotBuilt, match=r"none\.so.*python -m w4afp8\.build"):
        load()


def test_file_that_is_no_library_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(LibraryMismatch, match=r"text\.so"):
        Library(tmp_path / "text.so")


@needs_compiler
def test_library_of_another_version_is_a_mismatch(tmp_path: Path) -> None:
    with pytest.raises(
        LibraryMismatch, match=f"expected interface version {library.ABI_VERSION}, got {library.ABI_VERSION + 1}"
    ):
        Library(fake_library(tmp_path, version=library.ABI_VERSION + 1))


@needs_compiler
def test_library_with_other_structs_is_a_mismatch(tmp_path: Path) -> None:
    with pytest.raises(LibraryMismatch, match="expected bytes of GroupedGemmArguments"):
        Library(fake_library(tmp_path, extra_bytes=8))


@needs_compiler
def test_library_that_lacks_a_function_is_a_mismatch(tmp_path: Path) -> None:
    other = compile_cpp(tmp_path, 'extern "C" int w4afp8_abi_version() { return 1; }\n', "-shared", "-fPIC")
    with pytest.raises(LibraryMismatch, match="w4afp8_struct_bytes"):
        Library(other)


@needs_compiler
def test_error_code_becomes_an_error_with_the_librarys_words(tmp_path: Path) -> None:
    fake = Library(fake_library(tmp_path, quantize="return a->rows == 5 && a->k == 7 && a->device == 3 ? 1001 : 0;"))
    fake.quantize(QuantizeArguments(rows=4, k=7, device=3))
    with pytest.raises(KernelError, match=r"w4afp8_quantize: told so \(code 1001\)") as caught:
        fake.quantize(QuantizeArguments(rows=5, k=7, device=3))
    assert caught.value.code == 1001
    with pytest.raises(KernelError, match="code 42"):
        fake.grouped_gemm(GroupedGemmArguments(n=40, group=2))
    with pytest.raises(KernelError, match=r"w4afp8_slice: .*code 43"):
        fake.slice_rows(SliceArguments(k=33, bits=10))
    with pytest.raises(KernelError, match=r"w4afp8_gate: .*code 44"):
        fake.gate(GateArguments(experts=32, top_k=8, scaling_factor=4.5))


@needs_compiler
def test_threads_share_one_open_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4AFP8_LIBRARY", str(fake_library(tmp_path)))
    first = load()
    with ThreadPoolExecutor(4) as pool:
        assert all(other is first for other in pool.map(lambda _: load(), range(16)))


@needs_library
def test_built_library_loads_and_knows_its_error_codes() -> None:
    built = Library(BUILT)
    assert "16 bytes" in built.error_string(1002)
    assert "9.0" in built.error_string(1003)
    assert built.error_string(2) == "out of memory"


@needs_library
@without_gpu
def test_without_gpu_kernels_return_an_error() -> None:
    built = Library(BUILT)
    buffer = torch.zeros(1 << 16, dtype=torch.uint8)
    at = buffer.data_ptr() + -buffer.data_ptr() % 16
    gemm = GroupedGemmArguments(
        x=at, x_scales=at, weight=at, channel_scales=at, offsets=at, y=at, rows=1, experts=1, n=128, k=128,
        expected_rows=1, group=128,
    )  # fmt: skip
    with pytest.raises(KernelError):
        built.grouped_gemm(gemm)
    with pytest.raises(KernelError):
        built.quantize(QuantizeArguments(x=at, values=at, scales=at, rows=1, k=128))
    with pytest.raises(KernelError):
        built.slice_rows(SliceArguments(x=at, slices=at, units=at, rows=1, k=128, bits=20))
    with pytest.raises(KernelError):
        built.gate(GateArguments(logits=at, ids=at, weights=at, non_finite=at, rows=1, experts=8, top_k=2, groups=1))


@needs_library
def test_kernels_refuse_bad_shapes_and_addresses() -> None:
    built = Library(BUILT)
    with pytest.raises(KernelError, match="multiple of what it must be"):
        built.quantize(QuantizeArguments(x=16, values=16, scales=16, rows=1, k=129))
    with pytest.raises(KernelError, match="not aligned"):
        built.quantize(QuantizeArguments(x=17, values=16, scales=16, rows=1, k=128))
    with pytest.raises(KernelError, match="multiple of what it must be"):
        built.grouped_gemm(GroupedGemmArguments(x=16, weight=16, y=16, rows=1, experts=1, n=128, k=100, group=128))
    with pytest.raises(KernelError, match="multiple of what it must be"):
        built.slice_rows(SliceArguments(x=16, slices=16, units=16, rows=1, k=127, bits=20))
    with pytest.raises(KernelError, match="multiple of what it must be"):
        built.slice_rows(SliceArguments(x=16, slices=16, units=16, rows=1, k=128, bits=27))
    with pytest.raises(KernelError, match="not aligned"):
        built.slice_rows(SliceArguments(x=24, slices=16, units=16, rows=1, k=128, bits=20))


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        {"experts": 1025}, {"top_k": 33}, {"top_k": 0}, {"top_k": 65}, {"groups": 3}, {"groups": 33}, {"groups": 0},
        {"groups": 64}, {"groups": 32, "top_groups": 3}, {"groups": 4, "top_groups": 5}, {"logits_type": 3},
        {"logits": None}, {"products": 16}, {"logits": None, "products": 16, "parts": 0, "bits": 20}, {"scores": 2},
        {"scores": 1, "bias": 16}, {"scores": 1, "groups": 4, "top_groups": 2},
    ],
)  # fmt: skip
def test_the_gate_refuses_what_it_cannot_hold(change: dict[str, int | None]) -> None:
    built = Library(BUILT)
    fitting = {"logits": 16, "ids": 16, "weights": 16, "non_finite": 16, "rows": 1, "experts": 64, "top_k": 8}
    with pytest.raises(KernelError, match="multiple of what it must be"):
        built.gate(GateArguments(**(fitting | {"groups": 1} | change)))
