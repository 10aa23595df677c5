"""What a checkpoint changes on a disk, each change told before it happens; files are hashed as they are written."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

Action = Literal["write", "sync", "rename", "remove", "upload"]
Hook = Callable[[Action, str], None]
"""Called before a change, with the file that it is of: a place to inject a fault. What it raises, the change raises."""

_BUFFER_BYTES = 1 << 20


def unhindered(action: Action, name: str) -> None:
    """The hook of every run that no fault is injected into."""


class FileEntry(BaseModel):
    """A file below a folder, as it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    sha256: str

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        return inside(name)


def inside(name: str) -> str:
    """A file's name below a folder; ValueError where it could lie anywhere else."""
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"{name!r} is not the name of a file in its folder")
    return name


class Files:
    """New files in one folder of a disk. Each is on the disk, and in `written`, once `create` is left."""

    def __init__(self, folder: Path, before: Hook = unhindered) -> None:
        self.folder, self._before = folder, before
        self.written: dict[str, FileEntry] = {}

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Open a new file for one writing from its beginning to its end, which is hashed as it goes by."""
        path = self.folder / inside(name)
        with path.open("wb", buffering=0) as raw:
            hashing = _Hashing(raw, name, self._before)
            stream = io.BufferedWriter(hashing, _BUFFER_BYTES)
            try:
                yield stream
                stream.close()  # but not the file below, which is still to be synchronised
            except Exception as error:
                # torch.save says of a full disk that its position is not as expected.
                raise hashing.refused or error from None
            self._before("sync", name)
            os.fsync(raw.fileno())
        self.written[name] = FileEntry(name=name, size_bytes=hashing.size, sha256=hashing.digest.hexdigest())

    def sync(self) -> None:
        """Have the names of the new files on the disk too."""
        sync_folder(self.folder, self._before)


class _Hashing(io.RawIOBase):
    def __init__(self, raw: Any, name: str, before: Hook) -> None:
        self._raw, self._name, self._before = raw, name, before
        self.size, self.digest = 0, hashlib.sha256()
        self.refused: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        try:
            self._before("write", self._name)
            count = int(self._raw.write(content))
        except OSError as error:
            self.refused = error
            raise
        with memoryview(content) as view:
            self.digest.update(view[:count])
        self.size += count
        return count

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return int(self._raw.fileno())


def replace_file(path: str, content: bytes, before: Hook = unhindered) -> None:
    """Whole or not at all, on a disk: by a rename, after which a loss of power leaves the new content."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            before("write", path)
            file.write(content)
            file.flush()
            before("sync", path)
            os.fsync(file.fileno())
        before("rename", path)
        os.replace(partial, path)
    except OSError:
        Path(partial).unlink(missing_ok=True)
        raise
    sync_folder(Path(path).parent, before)


def remove_tree(path: Path, before: Hook = unhindered) -> None:
    """A file, or a folder file by file; nothing happens where it does not exist."""
    if path.is_dir() and not path.is_symlink():
        for below in sorted(path.iterdir()):
            remove_tree(below, before)
        path.rmdir()
    elif path.is_symlink() or path.exists():
        before("remove", str(path))
        path.unlink()


def sync_folder(folder: Path, before: Hook = unhindered) -> None:
    before("sync", str(folder))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
