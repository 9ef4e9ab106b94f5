"""Synthetic checkpoints: random weights that look like quantized ones, in the same files as real models.

Only the MoE parts are written (routed and shared experts, routers); there is no attention, embedding or dense layer.
Each tensor has its own random stream, seeded by its name, so that the bytes do not depend on threads or order.

A thread makes a whole shard, so there are many: threads that write to one file wait for each other, since the kernel
locks it while it finds and fills pages (where memory is new to a virtual machine, at 0.3 GB/s). Random numbers, table
look-ups and writes release the interpreter lock; what is left under it is some percent of a thread's time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from moe_forward.checkpoint.layout import (
    CONFIG_FILE,
    PROJECTIONS,
    SCALE_SUFFIX,
    block_scale_shape,
    expert_matrix,
    gate_bias,
    gate_weight,
    int4_shapes,
    matrix_shape,
    shared_matrix,
)
from moe_forward.checkpoint.presets import PRESETS, Preset
from moe_forward.checkpoint.shards import Job, Shard, available_cores, write_index
from moe_forward.checkpoint.writer import ShardWriter, TensorEntry, require_space, write_document
from moe_forward.errors import CheckpointError

SHARD_BYTES = 128 << 20  # 44 shards of one layer of DeepSeek-R1
MANY_SHARDS = 64  # or a few more of a larger model, whose shards are larger
CHUNK_BYTES = 1 << 18  # made at a time: random numbers, table and result stay in a core's cache
GROUP_AMAX = 2.8  # largest of 128 normal numbers, in standard deviations, on average
BLOCK_AMAX = 4.2  # largest of 128 x 128
SCALE_JITTER = 0.15  # standard deviation of the logarithm of a scale
BIAS_STD = 0.02

Table = npt.NDArray[np.uint8]


def make_model(preset: str, folder: Path, layers: int | None = None, seed: int = 0, progress: bool = True) -> None:
    """Write the MoE parts of a random model (no attention, embeddings or dense layers).

    preset: tiny or deepseek-r1-layer. folder: made if missing, must not hold a model. layers: number of MoE layers.
    seed: the same seed gives the same bytes. progress: show a bar of the bytes made.
    Raises: CheckpointError for an unknown preset, a bad number of layers, or a folder that is in use or too small.
    """
    if preset not in PRESETS:
        raise CheckpointError(f"unknown preset {preset!r}; there are {', '.join(sorted(PRESETS))}")
    write_model(PRESETS[preset], folder, layers, seed, progress)


def write_model(
    preset: Preset,
    folder: Path,
    layers: int | None = None,
    seed: int = 0,
    progress: bool = True,
    max_shard_bytes: int | None = None,
    workers: int | None = None,
) -> None:
    """Do what `make_model` does for any shape.

    max_shard_bytes: of a shard, or one tensor; default by the size of the model. workers: threads; default one a core.
    """
    count = preset.moe_layers if layers is None else layers
    if count < 1:
        raise CheckpointError(f"layers: expected at least one MoE layer, got {count}")
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; choose another folder or remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(_jobs(preset, count, seed))
    total = sum(job.work_bytes for job in jobs)
    require_space(folder, total)
    groups = list(_grouped(jobs, max_shard_bytes or max(SHARD_BYTES, -(-total // MANY_SHARDS))))
    shards = [
        Shard(folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors", {"format": "pt"}, tuple(group))
        for number, group in enumerate(groups, start=1)
    ]
    with tqdm(total=total, desc="make", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        _write_at_once(shards, workers or available_cores(), bar.update)
    write_index(folder, {entry: shard.path.name for shard in shards for entry in shard.entries})
    write_document(folder / CONFIG_FILE, preset.config(count))


def _write_at_once(shards: Sequence[Shard], workers: int, on_done: Callable[[int], object]) -> None:
    """Write shards in parallel, each atomically by one thread.

    on_done: called in this thread with the bytes of each finished shard.
    Raises: the first error of any shard; finished ones stay, unfinished ones are removed.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(_write, shard): shard for shard in shards}
        for future in as_completed(futures):
            future.result()
            on_done(sum(job.work_bytes for job in futures[future].jobs))
    finally:
        pool.shutdown(cancel_futures=True)


def _write(shard: Shard) -> None:
    writer = ShardWriter(shard.path, shard.entries, shard.metadata)
    try:
        for job in shard.jobs:
            for entry, tensor in zip(job.entries, job.compute(), strict=True):
                writer.write(entry.name, tensor)
    except BaseException:
        writer.discard()
        raise
    writer.commit()


def _grouped(jobs: Iterable[Job], max_shard_bytes: int) -> Iterator[list[Job]]:
    group: list[Job] = []
    group_bytes = 0
    for job in jobs:
        if group and group_bytes + job.work_bytes > max_shard_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(job)
        group_bytes += job.work_bytes
    yield group


def _jobs(preset: Preset, layers: int, seed: int) -> Iterator[Job]:
    hidden, intermediate = preset.hidden_size, preset.intermediate_size
    nibbles, floats = _nibble_pairs(), _fp8_values()
    for layer in range(preset.dense_layers, preset.dense_layers + layers):
        yield _job(TensorEntry(gate_weight(layer), "BF16", (preset.num_experts, hidden)), seed, _router)
        yield _job(TensorEntry(gate_bias(layer), "F32", (preset.num_experts,)), seed, _bias)
        for projection in PROJECTIONS:
            rows, columns = matrix_shape(projection, hidden, intermediate)
            name, scales = shared_matrix(layer, projection), block_scale_shape((rows, columns))
            mean = BLOCK_AMAX / 448 / math.sqrt(columns)
            yield _job(TensorEntry(name, "F8_E4M3", (rows, columns)), seed, partial(_looked_up, floats))
            yield _job(TensorEntry(name + SCALE_SUFFIX, "F32", scales), seed, partial(_scales, mean))
        for expert in range(preset.num_experts):
            for projection in PROJECTIONS:
                rows, columns = matrix_shape(projection, hidden, intermediate)
                codes, groups = int4_shapes((rows, columns))
                name, mean = expert_matrix(layer, expert, projection), GROUP_AMAX / 7 / math.sqrt(columns)
                yield _job(TensorEntry(name, "I8", codes), seed, partial(_looked_up, nibbles))
                yield _job(TensorEntry(name + SCALE_SUFFIX, "F32", groups), seed, partial(_scales, mean))


def _job(entry: TensorEntry, seed: int, make: Callable[[np.random.Generator, TensorEntry], torch.Tensor]) -> Job:
    def compute() -> tuple[torch.Tensor]:
        stream = np.random.SeedSequence([seed, zlib.crc32(entry.name.encode())])
        return (make(np.random.Generator(np.random.SFC64(stream)), entry),)

    return Job((entry,), entry.size_bytes, compute)


def _looked_up(table: Table, generator: np.random.Generator, entry: TensorEntry) -> torch.Tensor:
    """Bytes of any distribution: 16 random bits choose one of the 65536 bytes of a table."""
    out = np.empty(math.prod(entry.shape), np.uint8)
    for start in range(0, out.size, CHUNK_BYTES):
        part = out[start : start + CHUNK_BYTES]
        chosen = generator.integers(0, 1 << 64, size=-(-part.size // 4), dtype=np.uint64).view(np.uint16)
        np.take(table, chosen[: part.size], out=part, mode="clip")  # clip: without it numpy checks and buffers
    dtype = torch.int8 if entry.dtype == "I8" else torch.float8_e4m3fn
    return torch.from_numpy(out).view(dtype).view(entry.shape)


def _scales(mean: float, generator: np.random.Generator, entry: TensorEntry) -> torch.Tensor:
    jitter = generator.standard_normal(entry.shape, dtype=np.float32)
    return torch.from_numpy(np.exp(jitter * np.float32(SCALE_JITTER)) * np.float32(mean))


def _router(generator: np.random.Generator, entry: TensorEntry) -> torch.Tensor:
    values = generator.standard_normal(entry.shape, dtype=np.float32) / np.float32(math.sqrt(entry.shape[1]))
    return torch.from_numpy(values).to(torch.bfloat16)


def _bias(generator: np.random.Generator, entry: TensorEntry) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(entry.shape, dtype=np.float32) * np.float32(BIAS_STD))


def _normal_quantiles(count: int) -> torch.Tensor:
    """`count` equally likely values of a standard normal distribution, ascending."""
    quantiles: torch.Tensor = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return quantiles


def _nibble_pairs() -> Table:
    """A byte for each 16 bits: its nibbles are independent rounded normal numbers in [-7, 7]."""
    codes = (_normal_quantiles(256) * (7 / GROUP_AMAX)).round().clamp(-7, 7).to(torch.int64) & 15
    table: Table = (codes.unsqueeze(0) | codes.unsqueeze(1) << 4).flatten().to(torch.uint8).numpy()
    return table


def _fp8_values() -> Table:
    """A byte for each 16 bits: normal numbers in e4m3 whose largest in a block of 128 x 128 is about 448."""
    values = (_normal_quantiles(1 << 16) * (448 / BLOCK_AMAX)).clamp(-448, 448)
    table: Table = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return table
