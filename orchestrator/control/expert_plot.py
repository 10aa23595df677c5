"""Expert loads of a run as a picture: who has most, layer by layer, and how well the past told it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from parallel.fssdp import LoadHistory

_LINE, _OTHER = "#1f5a94", "#d1622b"


def plot_expert_loads(lines: Sequence[dict[str, Any]], path: Path | IO[bytes]) -> None:
    """Write a PNG: of the last step a heat map, layers down and experts across; over steps, the busiest and the error.

    lines: of `expert_loads.jsonl`. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    layers = sorted(lines[-1]["loads"], key=int)
    figure = Figure(figsize=(9, min(12.0, 4.5 + 0.12 * len(layers))), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(1 + 0.04 * len(layers), 1))
    last = [lines[-1]["loads"][layer] for layer in layers]
    shown = upper.imshow([_over_mean(loads) for loads in last], aspect="auto", cmap="viridis", vmin=0)
    upper.set_yticks(range(0, len(layers), max(1, len(layers) // 20)), layers[:: max(1, len(layers) // 20)])
    upper.xaxis.get_major_locator().set_params(integer=True)
    upper.set_xlabel("expert")
    upper.set_ylabel("layer")
    upper.set_title(f"tokens of step {lines[-1]['step']:,}, over the mean of the layer", fontsize=10)
    figure.colorbar(shown, ax=upper)
    steps = [line["step"] for line in lines]
    peaks = [[max(_over_mean(loads)) for loads in line["loads"].values()] for line in lines]
    lower.plot(steps, [max(found) for found in peaks], color=_OTHER, label="busiest expert, worst layer")
    lower.plot(steps, [sum(found) / len(found) for found in peaks], color=_LINE, label="mean of layers")
    known = [(line["step"], error) for line, error in zip(lines, errors(lines), strict=True) if error is not None]
    if known:
        label = "share of tokens that the past misplaces"
        lower.plot(*zip(*known, strict=True), color="#6b7280", linestyle=":", label=label)
    lower.set_xlabel("step")
    lower.set_ylabel("over the mean")
    lower.set_ylim(bottom=0)
    lower.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    lower.spines[["top", "right"]].set_visible(False)
    lower.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png")


def errors(lines: Sequence[dict[str, Any]]) -> list[float | None]:
    """Of each line, the share of tokens that the mean of those before it puts at another expert; None of the first."""
    histories: dict[str, LoadHistory] = {}
    found: list[float | None] = []
    for line in lines:
        shares = []
        for layer, loads in line["loads"].items():
            history = histories.get(layer)
            if history is not None:
                predicted = history.predicted()
                scale = sum(loads) / max(1e-9, sum(predicted))
                off = sum(abs(load - scale * told) for load, told in zip(loads, predicted, strict=True))
                shares.append(off / 2 / max(1, sum(loads)))
            histories.setdefault(layer, LoadHistory(len(loads))).add(loads)
        found.append(sum(shares) / len(shares) if shares else None)
    return found


def _over_mean(loads: Sequence[int]) -> list[float]:
    mean = max(1e-9, sum(loads) / len(loads))
    return [load / mean for load in loads]
