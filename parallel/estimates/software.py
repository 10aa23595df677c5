"""What a version of a training framework adds to arithmetic: what it overlaps, and how far it runs from its kernels.

Residuals are fitted on measured steps by `python -m parallel.evidence.fitting`, which writes fitted.json; they belong
to the software that was measured, and what is not named there gets what all of them share.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Software:
    """Overlaps are shares of what could be hidden; residuals multiply, and 1 is none.

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
    gradients_whole: bool = False
    """A sharded optimizer's gradients are all-reduced in fp32, not scattered in the precision that they are kept in."""
    blocks_overlap: bool = False
    """Gathers and scatters of sequence parallelism go chunk by chunk beside the product that they feed or follow."""
    sends_hidden: float = 0.0
    """Of a plain schedule's sends; an interleaved one hides all."""
    gradients_fused: bool = True
    """The product that makes a weight's gradient adds it to the sum; False: a kernel of its own does, each
    micro-batch."""
    step_seconds: float = 0.0
    """Of a step, whatever its size: logging, loss scale, the optimizer's small kernels."""


OURS = "Fivefold on Megatron-Core 0.16.1"
"""What `fivefold run` trains with where engine=megatron."""

FACTS = {
    # Of 2022, before its distributed optimizer: gradients are reduced when the last micro-batch is done.
    "Megatron-DeepSpeed": Software(gradients_hidden=0.0, weights_hidden=0.0),
    # Its optimizer waits for gradients and gathers weights before the next step (arXiv 2311.05610 names no overlap);
    # its core/optimizer/allreduce.py makes gradients fp32 before it reduces them, with ZeRO too.
    "AA-Scaling": Software(gradients_hidden=0.0, weights_hidden=0.0, gradients_whole=True),
    "Megatron-LM 0.14 + TE": Software(),
    # Megatron-LM's README of the H100 runs names its overlaps: gradients, weights, tensor-parallel blocks, sends.
    "Megatron-Core r0.8.0": Software(blocks_overlap=True),
    # Reduces gradients when the last micro-batch is done, and gathers weights before the next step; runs without the
    # extension of APEX that gradient_accumulation_fusion needs.
    OURS: Software(gradients_hidden=0.0, weights_hidden=0.0, gradients_fused=False),
    # Its recipes of dense models set tp_comm_overlap.
    "Megatron-Core / Megatron-Bridge": Software(blocks_overlap=True),
    "Megatron-Bridge": Software(blocks_overlap=True),
}
"""What is known of each; residuals, where its steps were measured for calibration, are in the file."""


NEAREST = dict.fromkeys(("Megatron-Core", "Megatron-Core r0.8.0", OURS), "Megatron-LM 0.14 + TE")
"""Versions that were not measured for calibration, and the measured one of the same code whose residuals they get."""


SHARED = "shared"
"""Of the fitted file: what frameworks have in common, and so what one that was not measured is expected to add."""


@cache
def software(name: str) -> Software:
    """What is known of a version, with its residuals, its nearest version's, or those that all share."""
    residuals = _fitted()["software"]
    return replace(FACTS.get(name, Software()), **residuals.get(NEAREST.get(name, name), residuals[SHARED]))


def spread(name: str) -> float:
    """Half an interval, a factor: within it lie nine of ten steps of a version that was measured.

    Of one that was not: nine of ten steps of each measured one, predicted by what the others share.
    """
    spreads = _fitted()["spread"]
    return float(spreads.get(name, spreads[SHARED]))


@cache
def _fitted() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files("parallel.estimates") / "fitted.json").read_text(encoding="utf-8"))
    return found
