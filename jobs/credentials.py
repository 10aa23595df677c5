"""Credentials belong in the environment: a URL that holds some is refused before it is written down, never shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_USER = re.compile(r"(?<=://)[^/@\s]*:(?!\d+/)[^@\s]*@")
_QUERY = re.compile(r"(?<=[?&])([^=&\s]*(?:token|secret|passw|signature|credential|key)[^=&\s]*=)[^&\s]+", re.I)
RULE = (
    "holds credentials, which would stand in the run folder; give them in the environment, as your store's client does"
)


def hidden(text: str) -> str:
    """With `***` for each credential: `s3://***@bucket/corpus`."""
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))


def found(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted paths and values of all texts in a tree of mappings and sequences that hold credentials."""
    if isinstance(tree, str):
        if hidden(tree) != tree:
            yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from found(str(key), path)
            yield from found(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from found(value, path)
