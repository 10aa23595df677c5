"""A rank's swapping of activations, of both engines, and what is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from jobs.errors import InputError
from jobs.spec import JobSpec
from orchestrator.worker.host_memory import available_bytes
from parallel.estimates.swapping import HOST_SHARE
from parallel.estimates.workload import Workload
from parallel.layout import Layout
from parallel.offload import WHOLE, Figures, Swap
from parallel.swap import Host, SwapPlan, plan_swap

SETTLED_STEP = 3
"""Of an attempt: the first step knows no order of passes, and pins memory."""

STALLS = 0.02
"""Of a step's time: so much is worth a word."""


def swapping(job: JobSpec, device: torch.device) -> Swap | None:
    """None where activations stay."""
    fraction = job.layout.offload_activations
    if fraction is None:
        return None
    assert fraction != "auto", "a plan has made it a number"
    again = {"full": (WHOLE,), "selective": job.layout.options["recompute_modules"]}.get(job.layout.recompute or "", ())
    return Swap(device, fraction, HOST_SHARE * available_bytes() / job.cluster.devices_per_node, again=again)


def by_measured_times(job: JobSpec, layout: Layout, stage: int, figures: Figures) -> SwapPlan:
    """MEMO's closed form: what link and host would carry of a stage's layers. InputError as of `plan_swap`."""
    step = Workload.of(job, layout, job.layout.micro_batch or 1)
    host, layer = Host(figures.link_bytes_per_second, 1, figures.host_bytes, 1), figures.layer_seconds
    return plan_swap(step, stage, host, layer, layer)


class SwapNotices:
    """What a run is told of its swapped activations, once an attempt, by one rank of each pipeline stage."""

    def __init__(self, job: JobSpec, rank: int) -> None:
        self._job, self._layout = job, Layout.of(job.layout)
        at = self._layout.coordinates(rank)
        self._stage, self._is_asked = at["pp"], not (at["tp"] or at["cp"] or at["dp"])
        self._steps = 0

    def of(self, figures: Figures | None, seconds: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Events of a step that took so long: kind, message and data."""
        if figures is None or not self._is_asked:
            return
        self._steps += 1
        if self._steps != SETTLED_STEP:
            return
        if figures.left:
            yield (
                "activations_stayed",
                f"activations of {figures.left / 1e9:,.3f} GB a step stay on the device: host memory has "
                f"{figures.host_bytes / 1e9:,.3f} GB a rank for them",
                {"left_bytes": figures.left, "host_bytes": figures.host_bytes},
            )
        if not figures.copied:
            return
        does = "stalls" if figures.stalled > STALLS * seconds else "waits"
        message = (
            f"activations of {figures.copied / 1e9:,.3f} GB a step go to host memory at "
            f"{figures.link_bytes_per_second / 1e9:,.1f} GB/s; "
            f"computation {does} {figures.stalled:.3f} s of {seconds:.3f} for them"
        )
        data: dict[str, Any] = {
            "copied_bytes": figures.copied,
            "link_bytes_per_second": figures.link_bytes_per_second,
            "stalled_seconds": figures.stalled,
            "layer_seconds": figures.layer_seconds,
        }
        said, data["hidden_fraction"] = self._hidden(figures)
        yield "activations_swapped", message + said, data

    def _hidden(self, figures: Figures) -> tuple[str, float | None]:
        """The closed form's fraction by what was measured, and what it says of the job's."""
        if self._job.layout.recompute == "full":
            return "", None
        try:
            plan = by_measured_times(self._job, self._layout, self._stage, figures)
        except InputError as error:
            return f"; {error}", None
        return (
            f"; a layer's forward of {figures.layer_seconds:.3g} s hides {plan.alpha:.0%} of tokens, of which "
            f"{self._job.layout.offload_activations:.0%} are swapped",
            plan.alpha,
        )
