"""Weights from a Hugging Face folder into any layout, and from a model into such a folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from jobs.architecture import ModelArchitecture
from jobs.tensors import tensors
from models.huggingface_folder import INDEX, SINGLE, check
from models.huggingface_names import config, names
from models.weights import Shard, Source

FILE_BYTES = 5_000_000_000
"""Most that a written file holds, of tensors; a larger tensor has one of its own."""


def source(folder: str, model: ModelArchitecture) -> Source:
    """The weights in `folder`, each rank reading its own blocks only, in the precision of the file.

    InputError before anything is read where the folder does not hold `model`: see `huggingface_folder.check`.
    """
    entries = check(folder, model)
    opened = cache(_open)

    def read(shard: Shard) -> Tensor:
        entry = entries[shard.name]
        block: Tensor = shard.cut(opened(entry.file).get_slice(entry.name))
        return block

    return read


def _open(file: Path) -> Any:
    return safe_open(file, framework="pt")


def write(
    folder: Path,
    model: ModelArchitecture,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    sequence_length: int,
    file_bytes: int = FILE_BYTES,
) -> Iterator[Path]:
    """Write `model` into the existing `folder`, giving each file once it is there; config.json comes last.

    `read` is asked for each of `jobs.tensors` once, in their order, and its answer rounded to `dtype`; no more than a
    file's tensors are in memory. InputError where the model has no Hugging Face form.
    """
    theirs, described = names(model), config(model, str(dtype).removeprefix("torch."), sequence_length)
    files = _divided(model, dtype.itemsize, file_bytes)
    weight_map: dict[str, str] = {}
    os.umask(mask := os.umask(0))  # it can only be read by being set
    for number, held in enumerate(files, 1):
        file = folder / (SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors")
        save_file({theirs[name]: read(name).to(dtype).contiguous() for name in held}, file, metadata={"format": "pt"})
        file.chmod(0o666 & ~mask)  # safetensors would leave it to its owner alone
        weight_map |= {theirs[name]: file.name for name in held}
        yield file
    if len(files) > 1:
        total = sum(math.prod(shape) for shape in tensors(model).values()) * dtype.itemsize
        yield _json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    yield _json(folder / "config.json", described)


def _divided(model: ModelArchitecture, bytes_each: int, file_bytes: int) -> list[list[str]]:
    """The names of each file's tensors."""
    files: list[list[str]] = []
    room = 0
    for name, shape in tensors(model).items():
        size = math.prod(shape) * bytes_each
        if not files or size > room:
            files.append([])
            room = file_bytes
        files[-1].append(name)
        room -= size
    return files


def _json(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
