"""How much sharing experts gains from 32 to 1,024 devices, by simulation: skewed traces, times of a profiled device.

    python tests/planner/sharing.py --json docs/planner/sharing.json

Of one MoE layer, forward and backward, on the busiest rank: attention, the all-to-alls, the experts. Beside plain
expert parallelism and FSSDP stands rearrangement: experts change owners every fifty steps, equally many a rank, and
are never copied. Loads are Zipf-distributed and wander: each expert's by 5% a step, with a twentieth of the way back.
What decides is what trains (`parallel.fssdp`, `parallel.fssdp_sharding`); times are `parallel.estimates`', of the
H200's profile. Beyond as many ranks as there are experts, groups are replicas of one another.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np

from jobs.compose import compose
from parallel.estimates.copies import limits_of, wire_of
from parallel.estimates.hardware import Hardware, hardware
from parallel.estimates.traces import wandering
from parallel.estimates.workload import Workload
from parallel.fssdp import LoadHistory, busiest, materialise
from parallel.fssdp_dispatch import Topology, peak
from parallel.fssdp_means import token_seconds, window_seconds
from parallel.fssdp_sharding import reshard
from parallel.layout import Layout
from parallel.placement import Placement

WORLDS = (32, 64, 128, 256, 512, 1024)
MODELS = ("mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v3")
SKEWS = (0.3, 0.6, 1.0)
STEPS, WARM, EVERY = 120, 20, 50
PER_NODE = 8


@dataclass(frozen=True)
class Setting:
    model: str
    world: int
    skew: float

    @property
    def workload(self) -> Workload:
        """Two sequences of 4,096 a device; experts over as many ranks as there are, a divisor of the world."""
        job = compose("moe_1b", [f"model={self.model}", "cluster=h200_x8", "train.sequence_length=4096"])
        layout = Layout(dp=self.world, ep=gcd(self.world, job.model.experts))
        return replace(Workload.of(job, layout, 2), load="balanced", devices_per_node=PER_NODE)


def trace(experts: int, tokens: int, skew: float, seed: int = 1) -> Iterator[list[int]]:
    """Loads of an expert-parallel group's experts, step by step."""
    draw = np.random.default_rng(seed)
    for shares in wandering(draw, experts, skew):
        yield draw.multinomial(tokens, shares).tolist()


def simulate(setting: Setting, device: Hardware) -> dict[str, Any]:
    workload = setting.workload
    model, ranks = workload.model, workload.layout.ep
    window, wire = window_seconds(workload, device), wire_of(workload, device)
    limits, each = limits_of(workload, device, window), token_seconds(workload, device)
    topology = Topology(ranks, min(PER_NODE, ranks))
    even = Placement.even(model.experts, ranks)
    owners = {"rearranged": even, "fssdp": even}
    history = LoadHistory(model.experts)
    # What is not experts: attention forward and backward, and tokens there and back, twice.
    volume = workload.element * workload.tokens * model.top_k * model.hidden
    link = wire.link
    others = 3 * window + 4 * (volume * (ranks - 1) / ranks / link.bytes_per_second + link.latency_seconds)
    seconds: dict[str, list[float]] = {"ep": [], "rearranged": [], "fssdp": []}
    copies, shares = [], {"ep": [], "fssdp": []}
    loads_by_step = trace(model.experts, workload.tokens * model.top_k * ranks, setting.skew)
    for step, loads in zip(range(STEPS), loads_by_step, strict=False):
        placed = materialise(owners["fssdp"], history.forecasts(), limits)
        mean = sum(loads) / ranks
        if step >= WARM:
            moved = busiest(owners["fssdp"], placed)
            # Brought behind attention; brought again and given back behind its backward pass, which takes twice that.
            late = max(0.0, wire.seconds(moved) - window) if moved else 0.0
            for way, load, more in (
                ("ep", peak(even, loads), 0.0),
                ("rearranged", peak(owners["rearranged"], loads), 0.0),
                ("fssdp", peak(placed, loads), 3 * late),
            ):
                seconds[way].append(others + load * each + more)
            shares["ep"].append(peak(even, loads) / mean)
            shares["fssdp"].append(peak(placed, loads) / mean)
            copies.append(placed.copies)
        history.add(loads)
        if (step + 1) % EVERY == 0 or step + 1 == WARM:
            predicted = [history.predicted()]
            (owners["fssdp"],) = reshard([owners["fssdp"]], predicted, topology, limits)
            (owners["rearranged"],) = reshard([owners["rearranged"]], predicted, topology, replace(limits, slots=0))
    total = {way: float(np.mean(found)) for way, found in seconds.items()}
    return {
        "model": setting.model,
        "devices": setting.world,
        "ranks": ranks,
        "zipf": setting.skew,
        "layer_ms": {way: 1e3 * found for way, found in total.items()},
        "speedup": {"over ep": total["ep"] / total["fssdp"], "over rearranged": total["rearranged"] / total["fssdp"]},
        "busiest": {way: float(np.mean(found)) for way, found in shares.items()},
        "copies": float(np.mean(copies)),
        # Brought twice and given back once: of what replicating every expert on every rank would move.
        "gigabytes_sent": 3 * float(np.mean(copies)) * wire.expert_bytes / 1e9,
        "share_of_all": float(np.mean(copies)) / max(1, model.experts * (ranks - 1)),
        "slots": limits.slots,
        "movable": limits.movable,
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    axes = figure.subplots(2, len(MODELS), sharex=True)
    for column, model in enumerate(MODELS):
        for skew, colour in zip(SKEWS, ("#9db8d9", "#1f5a94", "#d1622b"), strict=True):
            mine = [each for each in results if each["model"] == model and each["zipf"] == skew]
            devices = [each["devices"] for each in mine]
            axes[0][column].plot(devices, [each["speedup"]["over ep"] for each in mine], color=colour, marker="o", ms=3)
            rearranged = [each["speedup"]["over rearranged"] for each in mine]
            axes[0][column].plot(devices, rearranged, color=colour, linestyle=":")
            axes[1][column].plot(
                devices, [each["gigabytes_sent"] for each in mine], color=colour, marker="o", ms=3, label=f"Zipf {skew}"
            )
        axes[0][column].set_title(model, fontsize=10)
        axes[1][column].set_xscale("log", base=2)
        axes[1][column].set_xlabel("devices")
    axes[0][0].set_ylabel("speed-up of a layer\n(solid: over ep; dotted: over rearranged)")
    axes[1][0].set_ylabel("GB of experts sent, a layer and step")
    axes[1][-1].legend(frameon=False, fontsize=8)
    for each in axes.flat:
        each.grid(color="#e5e7eb", linewidth=0.8)
        each.set_ylim(bottom=0)
    figure.savefig(path)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path, required=True)
    options = arguments.parse_args()
    device = hardware("h200", PER_NODE)
    results = []
    known: dict[tuple[str, int, float], dict[str, Any]] = {}
    for setting in (Setting(model, world, skew) for model in MODELS for world in WORLDS for skew in SKEWS):
        key = setting.model, setting.workload.layout.ep, setting.skew
        if key not in known:
            known[key] = simulate(setting, device)
        found = known[key] | {"devices": setting.world}
        results.append(found)
        print(
            f"{setting.model:14} {setting.world:5} devices  Zipf {setting.skew}  "
            f"ep {found['layer_ms']['ep']:7.2f} ms  rearranged {found['layer_ms']['rearranged']:7.2f}  "
            f"fssdp {found['layer_ms']['fssdp']:7.2f} ({found['speedup']['over ep']:.2f}x)  "
            f"busiest {found['busiest']['ep']:.2f} -> {found['busiest']['fssdp']:.2f}  copies {found['copies']:.0f}"
        )
    document = {"command": "make simulate-sharing", "profile": "h200", "per_node": PER_NODE, "results": results}
    options.json.write_text(json.dumps(document, indent=1) + "\n")
    plot(results, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
