"""Build the sm_90a kernel library: `python -m w4afp8.build`, or this file itself where torch is not installed.

Every .cu file of csrc/ is compiled by its own nvcc, some at a time, and the objects are linked into one shared library
with a C interface (csrc/w4afp8.h) that contains CUDA's runtime and needs neither torch nor Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

if __package__:
    from w4afp8.ptxas import find_faults, format_table, parse_report
else:  # run as a file: its folder, not the package, is on the path
    from ptxas import find_faults, format_table, parse_report  # type: ignore[import-not-found,no-redef]

SOURCE = Path(__file__).parent / "csrc"
OUTPUT = Path(__file__).parent / "lib" / "libw4afp8.so"

_ARCHITECTURE = ("-gencode", "arch=compute_90a,code=sm_90a")
_COMPILE = (
    *_ARCHITECTURE,
    *("-c", "-O3", "-std=c++17", "--expt-relaxed-constexpr"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-Xptxas", "-v"),
)
# The runtime's own symbols stay inside, so that torch's and the library's cannot be mixed up.
_LINK = (*_ARCHITECTURE, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL")


class BuildError(RuntimeError):
    """The library could not be built, or a kernel in it is not as it must be."""


def find_nvcc() -> Path:
    """Find nvcc in $CUDA_HOME/bin, else on PATH.

    Raises: BuildError where it is in neither.
    """
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)
    if found is None:
        where = f"CUDA_HOME={home}" if home else "PATH"
        raise BuildError(f"nvcc: not found in {where}; install the CUDA toolkit (12.3 or newer) or set CUDA_HOME")
    return Path(found)


def find_cutlass(given: Path | None = None) -> Path:
    """Find CUTLASS's headers: as given, in $W4AFP8_CUTLASS_INCLUDE, else in the package `nvidia-cutlass`.

    given: the include folder.
    Raises: BuildError where cutlass/cutlass.h is not there.
    """
    variable = os.environ.get("W4AFP8_CUTLASS_INCLUDE")
    if given is not None:
        include, origin = given, "--cutlass"
    elif variable:
        include, origin = Path(variable), "W4AFP8_CUTLASS_INCLUDE"
    else:
        package = importlib.util.find_spec("cutlass_library")
        if package is None or not package.submodule_search_locations:
            raise BuildError(
                "CUTLASS headers: not found; install the package nvidia-cutlass (pip install 'moe-forward[build]'), "
                "or name their include folder by --cutlass or W4AFP8_CUTLASS_INCLUDE"
            )
        include, origin = Path(package.submodule_search_locations[0]) / "source" / "include", "package nvidia-cutlass"
    if not (include / "cutlass" / "cutlass.h").is_file():
        raise BuildError(f"CUTLASS headers: {origin} says {include}, but cutlass/cutlass.h is not in that folder")
    return include


def build(
    output: Path,
    nvcc: Path,
    includes: Sequence[Path],
    source: Path = SOURCE,
    jobs: int = 2,
    verbose: bool = False,
    allow_faults: bool = False,
) -> str:
    """Compile all .cu files of a folder and link them; the output is replaced at once or left alone.

    output: the library to write. nvcc: the compiler. includes: folders of headers beside `source`.
    source: the folder of .cu files. jobs: files compiled at a time. verbose: print commands and compiler output.
    allow_faults: list serialised wgmma instructions and spilled registers before the table, and build nevertheless.
    Returns: the table of kernels.
    Raises: BuildError where a command fails, and for those faults.
    """
    files = sorted(source.glob("*.cu"))
    if not files:
        raise BuildError(f"source: expected .cu files in {source}, found none")
    folders = [option for include in (source, *includes) for option in ("-I", str(include))]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as temporary:
        objects = [Path(temporary) / f"{file.stem}.o" for file in files]
        commands = [
            [str(nvcc), *_COMPILE, *folders, "-o", str(target), str(file)]
            for file, target in zip(files, objects, strict=True)
        ]
        with ThreadPoolExecutor(jobs) as pool:
            report = "\n".join(pool.map(lambda command: _run(command, verbose), commands))
        faults = _demangle(find_faults(report))
        if faults and not allow_faults:
            raise BuildError("kernels:\n" + "\n".join(faults))
        library = Path(temporary) / output.name
        _run([str(nvcc), *_LINK, "-o", str(library), *map(str, objects)], verbose)
        os.replace(library, output)
    kernels = parse_report(report)
    names = _demangle([kernel.name for kernel in kernels])
    table = format_table([replace(kernel, name=name) for kernel, name in zip(kernels, names, strict=True)])
    return "\n".join([*faults, table])


def _run(command: list[str], verbose: bool) -> str:
    if verbose:
        print(" ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")
    if verbose:
        print(done.stdout, flush=True)
    return done.stdout


def _demangle(lines: Sequence[str]) -> list[str]:
    """Turn mangled names in `lines` into what was written in C++, where a tool for that is installed."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not lines:
        return list(lines)
    done = subprocess.run([tool], input="\n".join(lines), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    """Build as the command line says.

    arguments: without the program's name; default: the process's.
    Returns: the exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m w4afp8.build", description="Build the sm_90a kernel library.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="library to write (default: lib/ of the package)")
    parser.add_argument("--cutlass", type=Path, help="include folder of CUTLASS (default: package nvidia-cutlass)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="files compiled at a time")
    parser.add_argument(
        "--allow-faults", action="store_true", help="build even if wgmma is serialised or spills happen"
    )
    parser.add_argument("--verbose", action="store_true", help="print commands and compiler output")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        includes = [find_cutlass(options.cutlass)]
        table = build(
            options.output,
            find_nvcc(),
            includes,
            jobs=max(1, options.jobs),
            verbose=options.verbose,
            allow_faults=options.allow_faults,
        )
    except BuildError as error:
        print(f"w4afp8.build: {error}", file=sys.stderr)
        return 1
    print(f"{table}\n{options.output} in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
