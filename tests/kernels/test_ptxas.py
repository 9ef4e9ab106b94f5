from __future__ import annotations

from w4afp8.ptxas import KernelReport, find_faults, format_table, parse_report

CLEAN = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5firstv' for 'sm_90a'
ptxas info    : Function properties for _Z5firstv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 45 registers, used 1 barriers, 256 bytes smem
ptxas info    : Compile time = 1196.306 ms
ptxas info    : Compiling entry function '_Z6secondv' for 'sm_90a'
ptxas info    : Function properties for _Z6secondv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compile time = 4.000 ms
"""
SPILL = CLEAN.replace("0 bytes spill stores, 0 bytes spill loads", "12 bytes spill stores, 20 bytes spill loads", 1)
SERIALISED = CLEAN + (
    "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function '_Z6secondv'\n"
)


def test_report_of_two_kernels_is_read() -> None:
    assert parse_report(CLEAN) == [
        KernelReport("_Z5firstv", registers=45, spill_bytes=0, shared_bytes=256, seconds=1.196306),
        KernelReport("_Z6secondv", registers=8, spill_bytes=0, shared_bytes=0, seconds=0.004),
    ]


def test_clean_kernels_have_no_faults() -> None:
    assert find_faults(CLEAN) == []


def test_spill_is_a_fault_that_names_its_kernel() -> None:
    assert find_faults(SPILL) == ["_Z5firstv: 32 bytes of registers spilled"]


def test_serialised_wgmma_is_a_fault_that_names_its_kernel() -> None:
    (fault,) = find_faults(SERIALISED)
    assert fault.startswith("_Z6secondv: (C7514)")


def test_other_remarks_of_ptxas_are_no_faults() -> None:
    assert find_faults("ptxas info    : (C7508) something else in function '_Z5firstv'") == []


def test_table_has_a_line_for_each_kernel() -> None:
    head, first, second = format_table(parse_report(CLEAN)).splitlines()
    assert head.split() == ["registers", "spills", "shared", "seconds", "kernel"]
    assert first.split() == ["45", "0", "256", "1.2", "_Z5firstv"]
    assert second.split() == ["8", "0", "0", "0.0", "_Z6secondv"]
