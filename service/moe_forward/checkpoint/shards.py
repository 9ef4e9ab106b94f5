"""Fill shards tensor by tensor on all cores, holding one tensor a worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_forward.checkpoint.index import INDEX_FILE
from moe_forward.checkpoint.writer import ShardWriter, TensorEntry, write_document


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work.

    entries: what it makes. work_bytes: its share of the progress.
    compute: makes the tensors, in the order of `entries`; called in a worker thread.
    """

    entries: tuple[TensorEntry, ...]
    work_bytes: int
    compute: Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to write and the jobs that fill it."""

    path: Path
    metadata: Mapping[str, str]
    jobs: tuple[Job, ...]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Everything the file will hold."""
        return tuple(entry for job in self.jobs for entry in job.entries)


def available_cores() -> int:
    """Cores this process may use, which a container can limit."""
    return len(os.sched_getaffinity(0))


def write_shards(shards: Iterable[Shard], workers: int | None, on_done: Callable[[int], object]) -> None:
    """Write shards one after the other, each atomically, the tensors of one in parallel.

    workers: threads; default one a core. torch and numpy release the interpreter lock in the work that counts.
    on_done: called in this thread with the `work_bytes` of each finished job.
    Raises: the first error of any job; shards committed before it stay, the unfinished one is removed.
    """
    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers or available_cores(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        commits: list[Future[None]] = []
        for shard in shards:
            _fill(pool, shard, commits, on_done)
        for commit in commits:
            commit.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads_before)  # the workers' setting is the default of later threads


def write_index(folder: Path, places: Mapping[TensorEntry, str]) -> None:
    """Write model.safetensors.index.json.

    places: every tensor and the name of its file.
    """
    write_document(
        folder / INDEX_FILE,
        {
            "metadata": {"total_size": sum(entry.size_bytes for entry in places)},
            "weight_map": {entry.name: file for entry, file in sorted(places.items(), key=lambda item: item[0].name)},
        },
    )


def _fill(
    pool: ThreadPoolExecutor, shard: Shard, commits: list[Future[None]], on_done: Callable[[int], object]
) -> None:
    writer = ShardWriter(shard.path, shard.entries, shard.metadata)
    futures = {pool.submit(_run, writer, job): job for job in shard.jobs}
    try:
        for future in as_completed(futures):
            future.result()
            on_done(futures[future].work_bytes)
        if commits:
            commits[-1].result()  # at most one shard waits for the disk behind the one being filled
    except BaseException:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()  # a running job still writes to the file
        writer.discard()
        raise
    commits.append(pool.submit(writer.commit))


def _run(writer: ShardWriter, job: Job) -> None:
    for entry, tensor in zip(job.entries, job.compute(), strict=True):
        writer.write(entry.name, tensor)
