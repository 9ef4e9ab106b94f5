"""Fill shards tensor by tensor on all cores, holding one tensor a worker."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    """Write shards, each atomically, the tensors of one in parallel; where one runs out of work the next has begun.

    workers: threads; default one a core. torch and numpy release the interpreter lock in the work that counts.
    on_done: called in this thread with the `work_bytes` of each finished job.
    Raises: the first error of any job; shards that were finished before it stay, the others are removed.
    """
    threads_before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers or available_cores(), initializer=torch.set_num_threads, initargs=(1,))
    disk = ThreadPoolExecutor(1)  # what is finished goes to the disk while others are filled
    filling: deque[_Filling] = deque()
    commits: list[Future[None]] = []
    try:
        for shard in shards:
            filling.append(_begin(pool, shard))
            if len(filling) > 1:
                _finish_first(filling, disk, commits, on_done)
        while filling:
            _finish_first(filling, disk, commits, on_done)
        for commit in commits:
            commit.result()
    except BaseException:
        _abandon(filling)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        disk.shutdown()
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


class _Filling(NamedTuple):
    """A shard whose jobs wait, run or have ended."""

    writer: ShardWriter
    jobs: Mapping[Future[None], Job]


def _begin(pool: ThreadPoolExecutor, shard: Shard) -> _Filling:
    writer = ShardWriter(shard.path, shard.entries, shard.metadata)
    return _Filling(writer, {pool.submit(_run, writer, job): job for job in shard.jobs})


def _finish_first(
    filling: deque[_Filling], disk: ThreadPoolExecutor, commits: list[Future[None]], on_done: Callable[[int], object]
) -> None:
    """Wait for the first shard's jobs and have it committed. Its jobs began before those of the others."""
    writer, jobs = filling[0]
    for future in as_completed(jobs):
        future.result()
        on_done(jobs[future].work_bytes)
    if commits:
        commits[-1].result()  # at most one shard waits for the disk behind those being filled
    filling.popleft()
    commits.append(disk.submit(writer.commit))


def _abandon(filling: Iterable[_Filling]) -> None:
    futures = [future for shard in filling for future in shard.jobs]
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.exception()  # a running job still writes to the file
    for shard in filling:
        shard.writer.discard()


def _run(writer: ShardWriter, job: Job) -> None:
    for entry, tensor in zip(job.entries, job.compute(), strict=True):
        writer.write(entry.name, tensor)
