"""What ptxas says of the kernels it made (`-Xptxas -v`), and which of it must fail a build."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")
_TIME = re.compile(r"Compile time = (?P<milliseconds>[\d.]+) ms")
# Potential Performance Loss: C7510 to C7519 are the reasons for which wgmma instructions are serialised.
_SERIALISED = re.compile(r"\((?P<code>C751\d)\)(?P<text>.*)")
_FUNCTION = re.compile(r"[Ff]unction\s+'?(?P<name>[\w$.]+)")


@dataclass(frozen=True)
class KernelReport:
    """One compiled kernel.

    name: as mangled. registers: of a thread. spill_bytes: stored and loaded. shared_bytes: static shared memory.
    seconds: ptxas took.
    """

    name: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    seconds: float = 0.0


def parse_report(text: str) -> list[KernelReport]:
    """Read the kernels of ptxas's report, in its order.

    text: what nvcc wrote with `-Xptxas -v`.
    Returns: one entry a kernel.
    """
    reports: list[KernelReport] = []
    for section in re.split(r"(?=Compiling entry function ')", text)[1:]:
        entry = _ENTRY.search(section)
        if entry is None:
            continue
        spills, used, shared = _SPILLS.search(section), _REGISTERS.search(section), _SHARED.search(section)
        time = _TIME.search(section)
        reports.append(
            KernelReport(
                entry["name"],
                int(used["registers"]) if used else 0,
                int(spills["stores"]) + int(spills["loads"]) if spills else 0,
                int(shared["bytes"]) if shared else 0,
                float(time["milliseconds"]) / 1e3 if time else 0.0,
            )
        )
    return reports


def find_faults(text: str) -> list[str]:
    """Find what makes a kernel wrong or slow though it compiles: serialised wgmma and spilled registers.

    A serialised wgmma is more than slow: SGLang issue 10572 was a wrong result that C7517 announced.

    text: what nvcc wrote with `-Xptxas -v`.
    Returns: one sentence a fault, with the kernel's mangled name.
    """
    faults = []
    for line in text.splitlines():
        found = _SERIALISED.search(line)
        if found is not None:
            function = _FUNCTION.search(found["text"])
            faults.append(f"{function['name'] if function else 'a kernel'}: ({found['code']}){found['text']}")
    for report in parse_report(text):
        if report.spill_bytes:
            faults.append(f"{report.name}: {report.spill_bytes} bytes of registers spilled")
    return faults


def format_table(reports: list[KernelReport]) -> str:
    """Lay kernels out in a table.

    reports: names as they shall be shown.
    Returns: lines of registers, spilled bytes, static shared bytes, ptxas seconds and name.
    """
    lines = ["registers  spills  shared  seconds  kernel"]
    for report in reports:
        lines.append(
            f"{report.registers:9d}  {report.spill_bytes:6d}  {report.shared_bytes:6d}  {report.seconds:7.1f}  "
            f"{report.name}"
        )
    return "\n".join(lines)
