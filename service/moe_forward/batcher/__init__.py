"""The queue of an engine: which requests become the next step, and when. Pure: time is an argument, nothing is sent.

`queue` decides, over a `line` of requests for each layer; `fairness` is between clients, `patience` is how long company
is worth waiting for, and `pace` is what finished steps have taught.
"""

from moe_forward.batcher.limits import BatchLimits, Queued
from moe_forward.batcher.pace import Pace
from moe_forward.batcher.queue import Ahead, Batcher

__all__ = ["Ahead", "BatchLimits", "Batcher", "Pace", "Queued"]
