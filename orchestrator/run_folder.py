"""A run is a folder: job.json, plan.json, events.jsonl, metrics.jsonl, ledger.json, status.json, logs/, checkpoints/.

On a local disk or at any fsspec URL, readable with nothing but a text editor. It is the truth about a run: what is not
in it is not remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from jobs import credentials
from jobs.errors import InputError, closest
from orchestrator.files import Hook, remove_tree, replace_file, unhindered

RUN_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,100}")
_REMOTE_REWRITE_SECONDS = 2.0


def new_run_id(job: str) -> str:
    return f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def is_url(place: str) -> bool:
    return "://" in place


class RunFolder:
    """Files of one run by name relative to its folder (`checkpoints/step-00000020/manifest.json`)."""

    def __init__(self, place: str, before: Hook = unhindered) -> None:
        from fsspec.core import url_to_fs

        self.before = before
        if any(credentials.found(place)):
            raise InputError("run root", place, credentials.RULE)
        place = place.removeprefix("file://")
        self.place = place.rstrip("/") if is_url(place) else str(Path(place).expanduser().resolve())
        try:
            # Other processes write here too: what a listing showed once says nothing of what is there now.
            self._files, self._root = url_to_fs(self.place, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError("run root", place, f"cannot be opened: {error}") from None
        self._appended: dict[str, _Rewritten] = {}

    @property
    def run_id(self) -> str:
        return self.place.rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """The folder as a path, or None where it is an object store."""
        return None if is_url(self.place) else Path(self.place)

    def path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def exists(self, name: str = "job.json") -> bool:
        return bool(self._files.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """Content of a file, with lines that `append` holds back; FileNotFoundError where there is none."""
        held = self._appended.get(name)
        if held is not None and held.dirty:
            return held.content
        content = self._files.cat_file(self.path(name))
        assert isinstance(content, bytes)
        return content

    def read_json(self, name: str) -> Any:
        """Parsed content, or None where there is no such file; InputError where it is not JSON."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(self.path(name), None, f"is not JSON: {error}") from None

    def read_lines(self, name: str) -> Iterator[dict[str, Any]]:
        """Records of a .jsonl file; a last line that a crash cut short is left out."""
        try:
            lines = self.read(name).split(b"\n")[:-1]
        except FileNotFoundError:
            return
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(self.path(name), None, f"line {number} is not JSON: {error}") from None

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all: by rename on a disk, by one put on an object store."""
        path = self.path(name)
        if self.local is None:
            self.before("upload", name)
            self._files.pipe_file(path, content)
        else:
            replace_file(path, content, self.before)

    def write_json(self, name: str, record: Any) -> None:
        self.write(name, json.dumps(record, indent=2).encode() + b"\n")

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Add lines to a .jsonl file, after its last whole one.

        Object stores cannot append: there the file is rewritten, at most every two seconds.
        """
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        if not lines:
            return
        if self.local is not None:
            with open(self.path(name), "a+b") as file:
                _drop_cut_line(file)
                file.write(lines)
            return
        if name not in self._appended:
            self._appended[name] = _Rewritten(self.read(name) if self.exists(name) else b"")
        self._appended[name].content += lines
        self._appended[name].dirty = True
        self.flush(_REMOTE_REWRITE_SECONDS)

    def flush(self, older_than_seconds: float = 0.0) -> None:
        """Write out lines that `append` holds back."""
        for name, held in self._appended.items():
            if held.dirty and time.monotonic() - held.written_at >= older_than_seconds:
                self._files.pipe_file(self.path(name), held.content)
                held.written_at, held.dirty = time.monotonic(), False

    def names(self, folder: str) -> list[str]:
        """Names directly under a folder of the run, sorted; none where it does not exist."""
        try:
            found = self._files.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where it does not exist."""
        try:
            return int(self._files.size(self.path(name)))
        except FileNotFoundError:
            return None

    def upload(self, source: Path, name: str) -> None:
        self.before("upload", name)
        self._files.put_file(str(source), self.path(name))

    def download(self, name: str, target: Path) -> None:
        self._files.get_file(self.path(name), str(target))

    def open(self, name: str) -> Any:
        return self._files.open(self.path(name), "rb")

    def remove(self, name: str) -> None:
        """A file or a whole folder of the run; nothing happens where it does not exist."""
        if self.local is not None:
            remove_tree(self.local / name, self.before)
        elif self._files.exists(self.path(name)):
            self.before("remove", name)
            self._files.rm(self.path(name), recursive=True)


def _drop_cut_line(file: IO[bytes]) -> None:
    """Remove what a crash left of a last line, or the next line would be glued to it and neither could be read."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


class _Rewritten:
    def __init__(self, content: bytes) -> None:
        self.content, self.written_at, self.dirty = content, float("-inf"), False


def import_filesystem(place: str) -> None:
    """Import what opening a run folder at `place` will need, and no more: an opened one may have threads."""
    from fsspec import get_filesystem_class
    from fsspec.utils import get_protocol

    get_filesystem_class(get_protocol(place))


def runs(root: str) -> list[RunFolder]:
    """Runs under a run root, the newest first."""
    folder = RunFolder(root)
    with readable(root):
        found = [RunFolder(f"{folder.place}/{name}") for name in folder.names("") if RUN_ID.fullmatch(name)]
        known = [(run.read_json("status.json") or {}, run) for run in found if run.exists()]
    return [run for _, run in sorted(known, key=lambda pair: pair[0].get("created_at", 0.0), reverse=True)]


@contextlib.contextmanager
def readable(place: str) -> Iterator[None]:
    """Say so where a folder may not be read, or an object store does not answer."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a filesystem's library raises what it likes
        rule = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise InputError("run root", place, rule) from None


def find_run(root: str, run: str) -> RunFolder:
    """A run by its id under `root`, or by the path or URL of its folder; `last` is the newest."""
    if run == "last":
        newest = runs(root)
        if not newest:
            raise InputError("run", run, f"there is no run under {root}")
        return newest[0]
    by_place = "/" in run
    if not by_place and not RUN_ID.fullmatch(run):
        raise InputError("run", run, "is not a run id (lower-case letters, digits, '-' and '_'), nor a folder")
    folder = RunFolder(run if by_place else f"{root.rstrip('/')}/{run}")
    with readable(folder.place):
        found = folder.exists()
    if not found:
        others = [] if by_place else [other.run_id for other in runs(root)]
        where = folder.place if by_place else root
        raise InputError("run", run, f"there is no such run under {where}", closest(run, others))
    return folder
