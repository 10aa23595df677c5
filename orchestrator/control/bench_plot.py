"""A bench as a picture: what each way reaches of each work, and how cost grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {"fivefold": "#1f5a94"}
_OTHERS = ("#d1622b", "#6b7280", "#8a9a5b", "#b08bbb")
_SWEEPS = {"sequence": "tokens in a sequence", "experts": "experts, eight of which a token visits"}


def plot(document: dict[str, Any], path: Path) -> None:
    """Write a PNG. Bars are FLOP/s where they are known, else the time by this project's way over that of each."""
    from matplotlib.figure import Figure

    results = [result for result in document["results"] if "seconds" in result]
    swept = {
        kind: [r for r in results if r["work"].split()[0] == kind and r["work"].split()[-1].isdigit()]
        for kind in _SWEEPS
    }
    bars = [result for result in results if not any(result in rows for rows in swept.values())]
    works = list(dict.fromkeys(_named(result) for result in bars))
    curves = [kind for kind in _SWEEPS if swept[kind]]
    figure = Figure(figsize=(9, 0.75 + 0.55 * len(works) + 3 * bool(curves)), dpi=150, layout="constrained")
    parts = figure.subfigures(
        1 + bool(curves), 1, height_ratios=(0.55 * len(works) + 0.75, 3)[: 1 + bool(curves)], squeeze=False
    )
    _bars(parts[0, 0].add_subplot(), bars, works, document["matmul_flops"])
    for place, kind in enumerate(curves, 1):
        _curve(parts[1, 0].add_subplot(1, len(curves), place), swept[kind], kind, document["matmul_flops"])
    figure.savefig(path)


def _named(result: dict[str, Any]) -> str:
    return " ".join(filter(None, (result["work"], result.get("load"))))


def _bars(axes: Any, results: list[dict[str, Any]], works: list[str], ceiling: float) -> None:
    ways = list(dict.fromkeys(result["way"] for result in results))
    colours = dict(zip((way for way in ways if way not in _COLOURS), _OTHERS * len(ways), strict=False)) | _COLOURS
    best = {_named(r): r["seconds"]["median"] for r in results if r["way"] == "fivefold"}
    for way in ways:
        at, lengths = [], []
        for result in results:
            if result["way"] == way:
                rate = result.get("flops_per_second")
                share = rate / ceiling if rate else best[_named(result)] / result["seconds"]["median"]
                at.append(works.index(_named(result)) + (ways.index(way) + 0.5) * 0.8 / len(ways) - 0.4)
                lengths.append(share)
        axes.barh(at, lengths, height=0.8 / len(ways), color=colours[way], label=way)
    axes.set_yticks(range(len(works)), works)
    axes.invert_yaxis()
    axes.set_xlabel("share of a large product's FLOP/s; without FLOPs, speed beside fivefold's")
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(ways))


def _curve(axes: Any, results: list[dict[str, Any]], kind: str, ceiling: float) -> None:
    sizes = [int(result["work"].split()[-1]) for result in results]
    measured = [1e6 / result["tokens_per_second"] for result in results]
    bound = [m * r["flops_per_second"] / ceiling for m, r in zip(measured, results, strict=True)]
    axes.plot(sizes, measured, color=_COLOURS["fivefold"], marker="o", markersize=3, label="measured")
    axes.plot(sizes, bound, color=_OTHERS[1], linestyle=(0, (2, 2)), label="model FLOPs at a large product's rate")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(_SWEEPS[kind])
    axes.set_ylabel("microseconds a token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
