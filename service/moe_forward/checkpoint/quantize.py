"""Quantize a checkpoint to the served layout: routed experts to int4, other linear weights to fp8 blocks.

Resumable: each finished shard carries the identity of its source shard, so that a second run skips it. config.json
is written last, so that an unfinished folder cannot be loaded.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from moe_forward.checkpoint.calibration import read_calibration
from moe_forward.checkpoint.convert import Scales, convert
from moe_forward.checkpoint.device import Device, DeviceName, choose_device
from moe_forward.checkpoint.documents import Keys, read_document
from moe_forward.checkpoint.index import INDEX_FILE, CheckpointIndex, open_index, read_header
from moe_forward.checkpoint.layout import (
    CONFIG_FILE,
    GROUP_SIZE,
    TENSORRT_FILE,
    quantization_config,
    quantization_settings,
    read_spec,
    text_config,
)
from moe_forward.checkpoint.mapped import MappedFiles, read_ahead
from moe_forward.checkpoint.matrices import part_bytes
from moe_forward.checkpoint.plan import Conversion, plan_conversions
from moe_forward.checkpoint.scale_search import (
    ErrorNotes,
    Search,
    convert_searched,
    remove_errors,
    require_errors,
    write_report,
)
from moe_forward.checkpoint.shards import Job, Shard, available_cores, write_index, write_shards
from moe_forward.checkpoint.writer import part_path, require_space, sync_folder, write_document
from moe_forward.errors import CheckpointError

Plan = Mapping[Path, tuple[Conversion, ...]]
Make = Callable[[Conversion], tuple[torch.Tensor, ...]]

SETTINGS = f"w4afp8 group_size={GROUP_SIZE} layout=1"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
MAX_COPIED_BYTES = 256 << 20
"""Tokenizers and remote code are far smaller; a larger file is weights of a format this tool does not know."""


def quantize(
    source: Path,
    destination: Path,
    workers: int | None = None,
    progress: bool = True,
    scales: Scales = "rtn",
    calibration: Path | None = None,
    device: DeviceName = "auto",
) -> None:
    """Write the served form of a checkpoint; calling it again after an interruption goes on where it stopped.

    source: HF folder in bf16, f16, f32 or DeepSeek's fp8 blocks. destination: folder, made if missing.
    workers: threads, each of which holds one tensor; default one a core, on a GPU at most 16.
    progress: show a bar of the bytes read, with rate and time left.
    scales: of int4. `rtn` takes amax / 7; `search` a scale of least squared error, about twice the work, and writes
        quantization_report.json, with the mean relative error of both.
    calibration: file as `checkpoint.calibration` tells of; `search` then takes the least error of outputs, and the
        report has the error of outputs too.
    device: where to quantize; auto takes a GPU where torch finds one. Bits are the same.
    Raises: CheckpointError naming what cannot be quantized, before anything is written; or a destination that holds
        something else or is being written by another process.
    Source: TensorRT-LLM examples/quantization/quantize_mixed_precision_moe.py (codes, scales and names).
    """
    if workers is not None and workers < 1:
        raise CheckpointError(f"workers: expected at least 1, got {workers}")
    if scales not in get_args(Scales):
        raise CheckpointError(f"scales: expected one of {', '.join(get_args(Scales))}, got {scales!r}")
    if calibration is not None and scales != "search":
        raise CheckpointError(f"calibration: expected scales 'search' with it, got {scales!r}")
    chosen = choose_device(device)
    _refuse_quantized(source)
    spec = read_spec(source)
    search = None
    if scales == "search":
        search = Search(None if calibration is None else read_calibration(calibration, spec))
    index = open_index(source)
    plan = plan_conversions(index, spec)
    destination.mkdir(parents=True, exist_ok=True)
    if destination.resolve() == source.resolve():
        raise CheckpointError(f"destination {destination} is the source itself")
    with _sole_writer(destination):
        pending = _pending(index, destination, search)
        searched = [destination / file.name for file in index.files if search and _int4_count(plan[file])]
        if (destination / CONFIG_FILE).exists():
            if pending:
                raise CheckpointError(f"{destination} has a config.json but misses {pending[0].name}; remove it first")
            remove_errors(searched)
            return  # finished by an earlier run
        require_errors(shard for shard in searched if shard.exists())
        waiting = [item for file in pending for item in plan[file]]
        require_space(destination, sum(entry.size_bytes for item in waiting for entry in item.entries))
        shards = _shards(index, plan, pending, destination, chosen, search)
        _write(shards, chosen, workers, progress)
        if (source / INDEX_FILE).is_file():
            places = {entry: file.name for file in index.files for item in plan[file] for entry in item.entries}
            write_index(destination, places)
        _copy_small_files(source, destination)
        if search and searched:
            write_report(destination, searched, search)
        write_document(
            destination / CONFIG_FILE,
            read_document(source / CONFIG_FILE) | {"quantization_config": quantization_config()},
        )
        remove_errors(searched)


def _refuse_quantized(source: Path) -> None:
    if (source / TENSORRT_FILE).is_file():
        raise CheckpointError(f"{source} is already quantized: it holds {TENSORRT_FILE}")
    config = Keys(read_document(source / CONFIG_FILE), str(source / CONFIG_FILE))
    settings = quantization_settings(config)
    if settings is None:
        if text_config(config) is not None:
            raise CheckpointError(f"{config.where}: only a language model by itself can be quantized, not one inside")
        return
    method = settings.text("quant_method")
    if method != "fp8" or settings.document.get("weight_block_size") != [128, 128]:
        raise CheckpointError(f"{settings.where}: the source is already quantized, with quant_method {method!r}")


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold the kernel's lock on the folder itself: it needs no lock file and ends with the process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{folder} is being written by another process") from error
        yield
    finally:
        os.close(handle)


def _int4_count(conversions: tuple[Conversion, ...]) -> int:
    return sum(item.to == "int4" for item in conversions)


def _identity(index: CheckpointIndex, file: Path, search: Search | None) -> dict[str, str]:
    status = file.stat()
    return {
        "format": "pt",
        "moe_forward.source": f"{index.headers[file].digest} {status.st_size} {status.st_mtime_ns}",
        "moe_forward.settings": SETTINGS if search is None else f"{SETTINGS} {search.settings}",
    }


def _pending(index: CheckpointIndex, destination: Path, search: Search | None) -> list[Path]:
    """Source shards without a finished counterpart; CheckpointError if the folder holds anything of another source."""
    found = {path.name for path in destination.glob("*.safetensors")}
    foreign = sorted(found - {file.name for file in index.files})
    if foreign:
        raise CheckpointError(f"{destination} holds {foreign[0]}, which {index.folder} has not; choose another folder")
    for file in index.files:
        if file.name in found and dict(read_header(destination / file.name).metadata) != _identity(index, file, search):
            raise CheckpointError(
                f"{destination / file.name} was made from another source or by other settings than {file}; "
                "choose another folder"
            )
    if not found and (destination / CONFIG_FILE).exists():
        raise CheckpointError(f"{destination} holds a {CONFIG_FILE} of something else; choose another folder")
    return [file for file in index.files if file.name not in found]


def _shards(
    index: CheckpointIndex, plan: Plan, pending: list[Path], destination: Path, device: Device, search: Search | None
) -> list[Shard]:
    """Put together what is to be written, and how it is made."""
    files = MappedFiles(index.files)
    shards = []
    for file in pending:
        path = destination / file.name
        make: Make = partial(convert, files, device)
        if search is not None:
            make = partial(convert_searched, files, device, search, ErrorNotes(path, _int4_count(plan[file])))
        jobs = (
            Job(item.entries, part_bytes(item.source, item.part), partial(_make, make, item)) for item in plan[file]
        )
        shards.append(Shard(path, _identity(index, file, search), tuple(jobs)))
    return shards


def _make(make: Make, conversion: Conversion) -> tuple[torch.Tensor, ...]:
    if conversion.part is None:
        read_ahead(conversion.source)
    return make(conversion)


def _write(shards: list[Shard], device: Device, workers: int | None, progress: bool) -> None:
    threads = workers or min(available_cores(), device.max_workers or available_cores())
    total = sum(job.work_bytes for shard in shards for job in shard.jobs)
    name = f"quantize on {device.name}"
    with tqdm(total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress) as bar:
        write_shards(shards, threads, bar.update)


def _copy_small_files(source: Path, destination: Path) -> None:
    for path in sorted(source.iterdir()):
        weights = path.name.endswith(WEIGHT_SUFFIXES) or path.name.endswith(".index.json")
        if weights or path.name == CONFIG_FILE or path.name.startswith(".") or not path.is_file():
            continue
        if path.stat().st_size > MAX_COPIED_BYTES:
            raise CheckpointError(f"{path} is too large for a tokenizer or a text; move it away and run again")
        part = part_path(destination / path.name)
        shutil.copyfile(path, part)
        os.replace(part, destination / path.name)
    sync_folder(destination)
