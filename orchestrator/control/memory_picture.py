"""A memory plan as a picture: addresses over a step, one rectangle a tensor, and what is alive at the fullest step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from parallel.memory_plan import MemoryPlan, Request, aligned, most_alive

_COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#9c755f")
_BOUND = "#111827"


def plot_told_memory(told: dict[str, Any], path: Path | IO[bytes]) -> None:
    """`plot_memory` of what a run's memory.json holds."""
    requests, placement = [Request(*one[:-1]) for one in told["requests"]], told["placement"]
    addresses = {one.name: told_one[-1] for one, told_one in zip(requests, told["requests"], strict=True)}
    plan = MemoryPlan(addresses, placement["bytes"], placement["bound_bytes"], placement["method"])
    plot_memory(requests, plan, path)


def plot_memory(requests: Sequence[Request], plan: MemoryPlan, path: Path | IO[bytes]) -> None:
    """Write a PNG, addresses in GB. requests: those that were planned. Needs matplotlib."""
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure  # not pyplot: a controller has no display, and wants no global state
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(10, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    tensors = [
        Rectangle((one.first, plan.addresses[one.name] / 1e9), one.last + 1 - one.first, aligned(one.size) / 1e9)
        for one in requests
    ]
    colours = [_COLOURS[number % len(_COLOURS)] for number in range(len(tensors))]
    # An edge would cover a tensor of a few steps among thousands.
    axes.add_collection(PatchCollection(tensors, facecolor=colours, edgecolor="white", linewidth=20 / len(tensors)))
    alive = most_alive(requests) / 1e9
    axes.axhline(alive, color=_BOUND, linestyle=(0, (4, 3)), linewidth=1.2, label=f"alive at once, {alive:.3f} GB")
    axes.set_xlim(min(one.first for one in requests), max(one.last for one in requests) + 1)
    axes.set_ylim(0, 1.15 * plan.peak / 1e9)
    axes.set_xlabel("allocations and frees of the step")
    axes.set_ylabel("address, GB")
    axes.set_title(f"{len(tensors):,} tensors in {plan.peak / 1e9:.3f} GB by {plan.method}, gap {plan.gap:.2%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, format="png")
