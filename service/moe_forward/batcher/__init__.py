"""The queue of an engine: which requests become the next step, and when. Pure: time is an argument, nothing is sent.

`queue` decides, over a `line` of requests for each layer; `fairness` is between clients, `patience` is how long company
is worth waiting for, `pace` is what finished steps have taught, and `admission` who would be answered too late.
"""

from moe_forward.batcher.admission import IN_TIME_PART
from moe_forward.batcher.ahead import Ahead
from moe_forward.batcher.limits import BatchLimits, Queued
from moe_forward.batcher.pace import Pace
from moe_forward.batcher.queue import Batcher

__all__ = ["IN_TIME_PART", "Ahead", "BatchLimits", "Batcher", "Pace", "Queued"]
