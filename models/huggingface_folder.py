"""What is in a Hugging Face folder, read from config.json and from the headers of its safetensors files. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.architecture import ModelArchitecture
from jobs.errors import CombinedInputError, InputError, closest
from jobs.tensors import Shape, tensors
from models.huggingface_names import disagreements, names

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NAMED = 10
"""Tensors of a kind that a message names; it counts the rest."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a folder."""

    file: Path
    name: str
    dtype: str
    shape: Shape


def check(folder: str, model: ModelArchitecture) -> dict[str, Entry]:
    """Where each of `jobs.tensors` lies in `folder`. Reads no weights.

    InputError, of several reasons all: a folder that is not there, a file that cannot be read or is cut short (with
    the byte), a config.json of another model (each field), tensors missing, extra, misshapen or not floating-point.
    """
    place = Path(folder).expanduser()
    if "://" in folder:
        rule = "is a URL; weights are read from a folder on a disk that every node sees"
        raise InputError("init_from", folder, rule, "a local path")
    if not place.is_dir():
        siblings = [str(other) for other in place.parent.glob("*/")] if place.parent.is_dir() else []
        raise InputError("init_from", folder, "is not a folder", closest(str(place), siblings))
    ours = names(model)
    errors: list[InputError] = []
    config = place / "config.json"
    try:
        errors += disagreements(_json_object(config), model, str(config))
    except InputError as error:
        errors.append(error)
    headers: dict[Path, dict[str, Entry]] = {}
    index: dict[str, Path] = {}
    try:
        index, files = _files(place)
        for file in files:
            try:
                headers[file] = read_header(file)
            except InputError as error:
                errors.append(error)
    except InputError as error:
        errors.append(error)
    if errors:  # tensors that are missing with a file, or for the sake of another model, are no news
        raise CombinedInputError(errors)
    found = {
        name: entry
        for file, header in headers.items()
        for name, entry in header.items()
        if index.get(name, file) == file
    }
    shapes = {ours[name]: shape for name, shape in tensors(model).items()}
    _compare(folder, found, shapes)
    return {name: found[theirs] for name, theirs in ours.items()}


def _compare(folder: str, found: Mapping[str, Entry], shapes: Mapping[str, Shape]) -> None:
    missing = [name for name in shapes if name not in found]
    extra = [name for name in found if name not in shapes]
    both = [(entry, shapes[name]) for name, entry in found.items() if name in shapes]
    misshapen = [f"{entry.name} {list(entry.shape)} for {list(shape)}" for entry, shape in both if entry.shape != shape]
    odd = [f"{entry.name} {entry.dtype}" for entry, _ in both if entry.dtype not in _BYTES]
    errors = [
        InputError("init_from", folder, f"{problem}: {_list(those)}")
        for problem, those in (
            (f"tensors missing ({len(missing)} of the model's {len(shapes)})", missing),
            (f"tensors extra ({len(extra)})", extra),
            (f"tensors misshapen ({len(misshapen)})", misshapen),
            (f"tensors of a precision not among {', '.join(_BYTES)} ({len(odd)})", odd),
        )
        if those
    ]
    if errors:
        raise CombinedInputError(errors)


def _list(items: list[str]) -> str:
    rest = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return ", ".join(items[:_NAMED]) + rest


def _files(place: Path) -> tuple[dict[str, Path], Iterable[Path]]:
    """The index, a file for each tensor (empty where there is one file and no index), and all files."""
    index = place / INDEX
    if index.exists():
        entries = _json_object(index).get("weight_map")
        if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
            raise InputError(str(index), None, "has no weight_map of tensors to files")
        named = {name: place / file for name, file in entries.items()}
        return named, sorted(set(named.values()))
    single = place / SINGLE
    if not single.exists():
        raise InputError("init_from", str(place), f"has neither {INDEX} nor {SINGLE}")
    return {}, [single]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(str(path), None, f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(str(path), None, f"is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(str(path), None, "is not a JSON object")
    return found


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: 8 bytes of header length, the header (JSON), the tensors one after another.

    InputError with the byte where the file ends too soon or is not what it should be.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            start = 8 + length
            if size < 8 or size < start:
                needed = "the first 8 bytes, the length of its header" if size < 8 else f"its header, to byte {start}"
                raise InputError(str(file), None, f"ends at byte {size}, within {needed}")
            header = opened.read(length)
    except OSError as error:
        raise InputError(str(file), None, f"cannot be read: {error.strerror}") from None
    try:
        described = json.loads(header)
        described.pop("__metadata__", None)
        entries: list[tuple[int, int, Entry]] = []
        for name, each in described.items():
            begin, end = map(int, each["data_offsets"])
            entries.append((begin, end, Entry(file, name, str(each["dtype"]), tuple(map(int, each["shape"])))))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(str(file), None, f"bytes 8 to {start} are no safetensors header: {error}") from None
    at = 0
    for begin, end, entry in sorted(entries, key=lambda each: each[:2]):
        bytes_each = _BYTES.get(entry.dtype)
        if begin != at or (bytes_each is not None and end - begin != bytes_each * math.prod(entry.shape)):
            kind = f"{entry.dtype} {list(entry.shape)}"
            rule = f"{entry.name}, {kind}, is said to take bytes {start + begin} to {start + end}; the one before it"
            raise InputError(str(file), None, f"{rule} ends at byte {start + at}")
        at = end
    if size != start + at:
        raise InputError(str(file), None, f"ends at byte {size}, its tensors at byte {start + at}")
    return {entry.name: entry for *_, entry in entries}
