"""Which data a job trains on: fsspec URLs and globs resolved to files of text, and all checked before anything starts.

Pure but for the filesystems that the user names. `stdlib:GLOB` is the running interpreter's standard library, without
what is installed beside it (site-packages) and without tests, which Linux distributions often leave out.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from jobs.errors import CombinedInputError, InputError, closest
from jobs.spec import DataSpec, TrainSpec

STDLIB = "stdlib:"
SEPARATOR = 256
"""The byte tokenizer's id between documents: the first that is no byte."""

_NOT_TEXT_OF_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_WILDCARD = re.compile(r"[*?\[]")
_VERSION_KEYS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated")


@dataclass(frozen=True, order=True)
class TextFile:
    """One document. Ordered by name, so that a corpus reads in one order wherever its folder lies."""

    name: str
    """Path below the fixed part of its pattern: the same on machines that keep the corpus in different folders."""
    url: str
    size_bytes: int
    version: str
    """What the filesystem gives to tell a changed file by (entity tag or modification time), or nothing."""
    filesystem: Any = field(compare=False, repr=False)
    path: str = field(compare=False, repr=False)

    def open(self) -> IO[bytes]:
        stream: IO[bytes] = self.filesystem.open(self.path, "rb")
        return stream


def resolve(data: DataSpec) -> list[TextFile]:
    """Every file that `data.files` names, once, sorted by name.

    Raises InputError for a pattern that matches nothing, whose filesystem cannot be read, or whose files are all empty;
    every such pattern is named.
    """
    found: dict[str, TextFile] = {}
    for files in _matches(data):
        for file in files:
            found.setdefault(file.url, file)
    return sorted(found.values())


def check(data: DataSpec, train: TrainSpec) -> None:
    """Raise InputError unless the text and the tokenizer, or the token files, are there and can be read.

    Costs a listing a pattern and the first bytes of each pattern's first file with text in it; of token files, see
    `jobs.indexed`.
    """
    if data.indexed is not None:
        from jobs import indexed  # with numpy, which planning does without

        indexed.check(data, train)
        return
    for pattern, files in zip(data.files or (), _matches(data), strict=True):
        first = next(file for file in files if file.size_bytes)
        try:
            with first.open() as stream:
                stream.read(1)
        except Exception as error:  # a filesystem's library raises what it likes
            raise unreadable(pattern, error, first.url) from error
    vocabulary_size(data)


def check_vocabulary(data: DataSpec, vocab: int) -> None:
    """Raise InputError unless a model of `vocab` token ids can read what `data.tokenizer` writes.

    Ids of token files are looked at when they are opened, for that takes reading them.
    """
    if data.indexed is not None:
        return
    needed = vocabulary_size(data)
    if vocab < needed:
        of_bytes = " (256 bytes and a document separator)" if data.tokenizer == "bytes" else ""
        rule = f"tokenizer {data.tokenizer} writes ids up to {needed - 1}{of_bytes}"
        raise InputError("model.vocab", vocab, rule, needed)


def vocabulary_size(data: DataSpec) -> int:
    """Token ids that the tokenizer can write: one more than the largest. 257 for bytes, with the separator.

    Raises InputError for a file that is no tokenizers JSON.
    """
    if data.tokenizer == "bytes":
        return SEPARATOR + 1
    text = tokenizer_json(data)
    try:
        content = json.loads(text)
        vocabulary = content["model"]["vocab"]
        # Unigram models list their pieces by id, all others map a piece to its id.
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        return 1 + max([*map(int, ids), *(int(token["id"]) for token in content.get("added_tokens") or [])])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        rule = f"is no tokenizers JSON file with a vocabulary: {_said(error)}"
        raise InputError("data.tokenizer", data.tokenizer, rule, "bytes") from error


def tokenizer_json(data: DataSpec) -> str:
    """Content of the file that `data.tokenizer` names; InputError if it cannot be read."""
    import fsspec

    try:
        with fsspec.open(data.tokenizer, "rt", encoding="utf-8") as stream:
            return str(stream.read())
    except Exception as error:  # a filesystem's library raises what it likes
        raise InputError("data.tokenizer", data.tokenizer, f"cannot be read: {_said(error)}", "bytes") from error


def unreadable(pattern: str, error: Exception, file: str | None = None) -> InputError:
    """The InputError for text that is there but that this user, or this machine, cannot read."""
    which = f"{file} " if file is not None and file != pattern else ""
    return InputError("data.files", pattern, f"{which}cannot be read: {_said(error)}")


def _matches(data: DataSpec) -> list[list[TextFile]]:
    """The files of each pattern, in the order of `data.files`, each with some text in it."""
    found, errors = [], []
    for pattern in data.files or ():
        try:
            files = sorted(_stdlib(pattern) if pattern.startswith(STDLIB) else _files(pattern))
            if not any(file.size_bytes for file in files):
                raise InputError("data.files", pattern, f"no text: it matches {len(files)} files, all of 0 bytes")
            found.append(files)
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else CombinedInputError(errors)
    return found


def _stdlib(pattern: str) -> Iterator[TextFile]:
    import fsspec
    from fsspec.utils import glob_translate

    root, local = sysconfig.get_path("stdlib"), fsspec.filesystem("file")
    wanted = re.compile(glob_translate(pattern.removeprefix(STDLIB)))
    matched = False
    for folder, folders, names in os.walk(root):  # pruned: site-packages may hold a hundred thousand files
        folders[:] = [name for name in folders if name not in _NOT_TEXT_OF_THE_LIBRARY]
        for name in names:
            path = os.path.join(folder, name)
            below = os.path.relpath(path, root).replace(os.sep, "/")
            if wanted.match(below):
                matched = True
                yield _text_file(STDLIB + below, STDLIB + below, local, path, local.info(path))
    if not matched:
        raise InputError("data.files", pattern, f"matches nothing in {root}", f"{STDLIB}**/*.py")


def _files(pattern: str) -> Iterator[TextFile]:
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(pattern)
        listed = filesystem.glob(path, detail=True)
        infos = {at: info for at, info in listed.items() if info["type"] == "file"}
        if not infos:
            raise _nothing(pattern, filesystem, path, listed)
    except InputError:
        raise
    except ImportError as error:  # fsspec names the package: "Install s3fs to access S3"
        raise InputError("data.files", pattern, f"needs a package that is not installed: {error}") from error
    except ValueError as error:
        protocol = pattern.partition("://")[0]
        nearest = closest(protocol, fsspec.available_protocols())
        raise InputError("data.files", pattern, str(error), nearest and f"{nearest}://") from error
    except Exception as error:  # a filesystem's library raises what it likes
        raise unreadable(pattern, error) from error
    root = _fixed_folder(path)
    for at, info in infos.items():
        yield _text_file(at.removeprefix(root), _url(pattern, filesystem, at), filesystem, at, info)


def _fixed_folder(path: str) -> str:
    """The folder part of a glob that has no wildcard in it, with its slash: `/a/b/` of `/a/b/**/*.txt`."""
    fixed = _WILDCARD.split(path, maxsplit=1)[0]
    return fixed[: fixed.rfind("/") + 1]


def _url(pattern: str, filesystem: Any, path: str) -> str:
    """An absolute URL; the rest of a chained one (`zip://*.txt::s3://...`) is kept."""
    chained = pattern.partition("::")[2]
    return f"{filesystem.unstrip_protocol(path)}{'::' + chained if chained else ''}"


def _text_file(name: str, url: str, filesystem: Any, path: str, info: dict[str, Any]) -> TextFile:
    size = info.get("size")
    if size is None:  # an HTTP server need not say
        size = len(filesystem.cat_file(path))
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return TextFile(name, url, int(size), version, filesystem, path)


def _nothing(pattern: str, filesystem: Any, path: str, listed: dict[str, Any]) -> InputError:
    """Why a pattern matches no file; for a plain name the nearest choice is a sibling spelled like it."""
    if listed:
        return InputError("data.files", pattern, "is a folder, not text", f"{pattern.rstrip('/')}/**")
    folder = _fixed_folder(path)
    try:  # a glob passes over a folder that it may not open or that is not there; listing it tells them apart
        siblings = filesystem.ls(folder, detail=False)
    except FileNotFoundError:
        return InputError("data.files", pattern, f"matches nothing: there is no folder {folder}")
    nearest = None if _WILDCARD.search(path) else closest(path, siblings)
    return InputError("data.files", pattern, "matches nothing", nearest)


def _said(error: Exception) -> str:
    """An exception in one line: its kind, and what it says if it says anything."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
