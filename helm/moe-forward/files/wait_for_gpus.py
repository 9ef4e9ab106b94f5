"""Wait until Ray has a GPU for every rank: workers join after the head, and the service counts when it starts."""

import json
import sys
import time
from pathlib import Path

import ray

POLL_SECONDS = 2

config = json.loads(Path(sys.argv[1]).read_text())
wanted = config["ranks"]
deadline = time.monotonic() + config["start_timeout_seconds"]
ray.init(address="auto", logging_level="WARNING")
told = None
while (gpus := int(ray.cluster_resources().get("GPU", 0))) < wanted:
    if time.monotonic() > deadline:
        raise SystemExit(f"expected {wanted} GPUs in the Ray cluster, {gpus} came: are all workers running?")
    if gpus != told:
        print(f"waiting for workers: {gpus} of {wanted} GPUs are there", flush=True)
        told = gpus
    time.sleep(POLL_SECONDS)
