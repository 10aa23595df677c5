"""What a version of a training framework adds to arithmetic: what it overlaps, and how far it runs from its kernels.

Residuals are fitted on measured steps by `python -m parallel.evidence.fitting`, which writes fitted.json; they belong
to the software that was measured, and what is not named there has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Software:
    """Overlaps are shares of what could be hidden; residuals multiply, and are 1 where nothing was measured.

    The defaults are Megatron-Core's: its distributed optimizer's overlap_grad_reduce and overlap_param_gather hide
    behind the backward and forward of one micro-batch, and its interleaved schedule's overlap_p2p_comm behind the other
    virtual stages' work (Megatron-LM README, the H100 runs' flags).
    """

    compute: float = 1.0
    """On matrix products and attention."""
    memory: float = 1.0
    """On kernels that move memory: how far they are from being fused."""
    launch: float = 1.0
    """On the host's time for starting a kernel."""
    network: float = 1.0
    """On collectives within a layer."""
    data: float = 1.0
    """On collectives of gradients and weights."""
    gradients_hidden: float = 1.0
    weights_hidden: float = 1.0
    blocks_overlap: bool = False
    """Gathers and scatters of sequence parallelism go chunk by chunk beside the product that they feed or follow."""
    sends_hidden: float = 0.0
    """Of a plain schedule's sends; an interleaved one hides all."""
    step_seconds: float = 0.0
    """Of a step, whatever its size: logging, loss scale, the optimizer's small kernels."""


OURS = "Fivefold on Megatron-Core 0.16.1"
"""What `fivefold run` trains with where engine=megatron."""

FACTS = {
    # Of 2022, before its distributed optimizer: gradients are reduced when the last micro-batch is done.
    "Megatron-DeepSpeed": Software(gradients_hidden=0.0, weights_hidden=0.0),
    # Its optimizer waits for gradients and gathers weights before the next step (arXiv 2311.05610 names no overlap).
    "AA-Scaling": Software(gradients_hidden=0.0, weights_hidden=0.0),
    "Megatron-LM 0.14 + TE": Software(),
    # Megatron-LM's README of the H100 runs names its overlaps: gradients, weights, tensor-parallel blocks, sends.
    "Megatron-Core r0.8.0": Software(blocks_overlap=True),
    # Reduces gradients when the last micro-batch is done, and gathers weights before the next step.
    OURS: Software(gradients_hidden=0.0, weights_hidden=0.0),
    # Its recipes of dense models set tp_comm_overlap.
    "Megatron-Core / Megatron-Bridge": Software(blocks_overlap=True),
    "Megatron-Bridge": Software(blocks_overlap=True),
}
"""What is known of each; residuals, where its steps were measured for calibration, are in the file."""


NEAREST = dict.fromkeys(("Megatron-Core", "Megatron-Core r0.8.0", OURS), "Megatron-LM 0.14 + TE")
"""Versions that were not measured for calibration, and the measured one of the same code whose residuals they get."""


@cache
def software(name: str) -> Software:
    """Facts of what is so named with its residuals, or its nearest version's; the defaults where it is unknown."""
    return replace(FACTS.get(name, Software()), **_fitted()["software"].get(NEAREST.get(name, name), {}))


def spread() -> float:
    """Factor within which nine of ten steps lie that were fitted on: half an interval."""
    return float(_fitted()["spread"])


@cache
def _fitted() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files("parallel.estimates") / "fitted.json").read_text(encoding="utf-8"))
    return found
