"""A program: RANK HOST PORT [FD]: join a group of two ranks that meets over TCP, and print the sum of rank + 1."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from moe_forward.exchange import Meeting, Place
from moe_forward.exchange.group import join, leave

rank, host, port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
listener = int(sys.argv[4]) if len(sys.argv) > 4 else None
join(Place(rank, 2, 4, Meeting(host, port, listener), 30.0, torch.device("cpu"), 128, 2, 8, 1))
total = torch.tensor([rank + 1])
dist.all_reduce(total)
print(int(total))
leave()
