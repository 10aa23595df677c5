"""Megatron without torch's compiler.

Megatron decorates some forty functions with torch.compile when it is imported. That costs two seconds, wants a C++
compiler at run time, and of these functions only a part of the router that does nothing would ever be called here.
Whoever imports Megatron first decides, so every such import is within `uncompiled()`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Said by Megatron when it is imported, of what is meant to be as it is.
warnings.filterwarnings("ignore", r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning)


@contextmanager
def uncompiled() -> Iterator[None]:
    kept, torch.compile = torch.compile, lambda function, **options: function
    try:
        yield
    finally:
        torch.compile = kept
