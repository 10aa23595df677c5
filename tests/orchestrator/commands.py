"""What a command line answered, and whether it refused as it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Answered:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The last thing on stdout, from a `{` that starts a line."""
        return json.loads(self.out[("\n" + self.out).rindex("\n{\n") :])


Fivefold = Callable[..., Answered]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(answer: Answered, path: str, nearest: object = None) -> str:
    """The one message of a refusal, which is the same in text and in the document where there is one."""
    assert answer.code == 2
    lines = answer.err.splitlines()
    assert len(lines) == 1, answer.err
    assert lines[0].startswith(f"fivefold: {path}")
    if answer.out:
        (error,) = answer.document["errors"]
        assert (error["path"], error["nearest"]) == (path, None if nearest is None else str(nearest))
        assert f"fivefold: {answer.document['error']}" == lines[0]
    if nearest is not None:
        assert lines[0].endswith(f"; nearest valid: {nearest}")
    return lines[0]
