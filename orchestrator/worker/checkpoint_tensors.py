"""torch.distributed.checkpoint without its pickles: what tensors a folder holds stands in JSON, and nothing runs.

torch writes that as a pickle, `.metadata`, and reads it with `pickle.load`; what is not a tensor
is any pickle to its planner. Files of tensors are torch's own, and hashed as they are written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from jobs.errors import InputError
from orchestrator.files import Files, inside

NAME = "tensors.json"


class Writer(torch_checkpoint.FileSystemWriter):
    """Through a `Files`, with `beside`: small files by name that rank 0 writes along, under torch's care for errors."""

    def __init__(self, files: Files, beside: Mapping[str, bytes]) -> None:
        super().__init__(files.folder, sync_files=False)  # `Files` does
        self.fs, self._files, self._beside = _Streams(files), files, beside

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0, once all have written."""
        stored = {result.index: result.storage_data for part in results for result in part}
        small = {NAME: _encode(metadata, stored), **self._beside}
        for name, content in small.items():
            with self._files.create(name) as file:
                file.write(content)
        self._files.sync()


class _Streams(FileSystem):
    def __init__(self, files: Files) -> None:
        self._files = files

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[IO[bytes]]:
        assert mode == "wb", "a writer reads nothing"
        with self._files.create(str(Path(path).relative_to(self._files.folder))) as stream:
            yield stream


class Reader(torch_checkpoint.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read(Path(self.path))


class PlainValues:
    """Before a load planner: what is not a tensor may hold nothing but plain values and tensors."""

    original_state_dict: dict[str, Any]
    mappings: dict[str, Any]

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


@dataclass
class _Stored:
    tensors: dict[str, Any]
    values: dict[str, Any]


def _encode(metadata: Metadata, stored: Mapping[MetadataIndex, _StorageInfo]) -> bytes:
    def place(index: MetadataIndex) -> list[Any]:
        info = stored[index]
        return [info.relative_path, info.offset, info.length]

    tensors, values = {}, {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            values[key] = place(MetadataIndex(key))
            continue
        chunks = [
            [list(chunk.offsets), list(chunk.sizes), *place(MetadataIndex(key, chunk.offsets))]
            for chunk in entry.chunks
        ]
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[key] = {"dtype": dtype, "size": list(entry.size), "chunks": chunks}
    return json.dumps({"tensors": tensors, "values": values}).encode()


def read(folder: Path) -> Metadata:
    """What `Writer` wrote of the tensors in a folder; InputError where that is not understood."""
    path = folder / NAME
    try:
        record = json.loads(path.read_bytes())
        return _decode(_Stored(record["tensors"], record["values"]))
    except FileNotFoundError:
        raise InputError(str(path), None, "is missing: the folder is not a checkpoint of Fivefold's") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(str(path), None, f"does not tell of tensors: {error}") from None


def _decode(stored: _Stored) -> Metadata:
    entries: dict[str, Any] = {key: BytesStorageMetadata() for key in stored.values}
    places = {MetadataIndex(key): _info(*place) for key, place in stored.values.items()}
    for key, tensor in stored.tensors.items():
        dtype = getattr(torch, tensor["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{tensor['dtype']} is no type of tensor")
        chunks = []
        for offsets, sizes, *place in tensor["chunks"]:
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            places[MetadataIndex(key, offsets)] = _info(*place)
        entries[key] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(tensor["size"]), chunks)
    return Metadata(entries, storage_data=places, storage_meta=StorageMeta())


def _info(name: str, offset: int, length: int) -> _StorageInfo:
    return _StorageInfo(inside(name), offset, length)
