"""The table of faults: a family is a module here, and its FAULTS are listed below."""

from __future__ import annotations

from ..scene import Fault
from . import clients, clock, corruption, disk, memory, network, processes, starts

FAMILIES = (processes, memory, disk, clock, clients, starts, network, corruption)
FAULTS: dict[str, Fault] = {fault.name: fault for family in FAMILIES for fault in family.FAULTS}
