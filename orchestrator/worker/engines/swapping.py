"""A rank's swapping of activations, of both engines."""

from __future__ import annotations

import torch

from jobs.spec import JobSpec
from orchestrator.worker.host_memory import available_bytes
from parallel.offload import WHOLE, Swap

HOST_SHARE = 0.8
"""Of the memory that is free when a rank begins, for all ranks of its machine together."""


def swapping(job: JobSpec, device: torch.device) -> Swap | None:
    """None where activations stay."""
    fraction = job.layout.offload_activations
    if fraction is None:
        return None
    again = {"full": (WHOLE,), "selective": job.layout.options["recompute_modules"]}.get(job.layout.recompute or "", ())
    return Swap(device, fraction, HOST_SHARE * available_bytes() / job.cluster.devices_per_node, again=again)
