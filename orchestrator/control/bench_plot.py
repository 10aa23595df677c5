"""A bench as a picture: what each way reaches of each work, and how cost grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = dict.fromkeys(("fivefold", "fssdp"), "#1f5a94")
_OTHER = "#b6bcc6"
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
    works = list(dict.fromkeys(named(result) for result in bars))
    curves = [kind for kind in _SWEEPS if swept[kind]]
    height = 2.0 + 0.17 * len(bars) + 0.12 * len(works)
    rows = 1 + bool(curves)
    figure = Figure(figsize=(9, height + 3 * bool(curves)), dpi=150, layout="constrained")
    parts = figure.subfigures(rows, 1, height_ratios=(height, 3)[:rows], squeeze=False)
    _bars(parts[0, 0].add_subplot(), bars, works, document["matmul_flops"])
    for place, kind in enumerate(curves, 1):
        _curve(parts[1, 0].add_subplot(1, len(curves), place), swept[kind], kind, document["matmul_flops"])
    figure.savefig(path)


def named(result: dict[str, Any]) -> str:
    """The work that a result is of."""
    return " ".join(filter(None, (result["work"], result.get("load"))))


def _bars(axes: Any, results: list[dict[str, Any]], works: list[str], ceiling: float) -> None:
    """A bar a way, which its name follows, in groups by work."""
    best = {named(r): r["seconds"]["median"] for r in results if r["way"] == "fivefold"}
    at, widest = 0.0, 1.0
    middles = []
    for work in works:
        first = at
        for result in (each for each in results if named(each) == work):
            rate = result.get("flops_per_second")
            share = rate / ceiling if rate else best[work] / result["seconds"]["median"]
            axes.barh(at, share, height=0.9, color=_COLOURS.get(result["way"], _OTHER))
            axes.text(share * 1.01, at, result["way"], va="center", fontsize=7, color="#374151")
            at, widest = at + 1, max(widest, share)
        middles.append((first + at - 1) / 2)
        at += 0.7
    axes.set_yticks(middles, works)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * widest)
    axes.set_xlabel("share of a large product's FLOP/s; without FLOPs, speed beside fivefold's")
    axes.grid(axis="x", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _curve(axes: Any, results: list[dict[str, Any]], kind: str, ceiling: float) -> None:
    sizes = [int(result["work"].split()[-1]) for result in results]
    measured = [1e6 / result["tokens_per_second"] for result in results]
    bound = [m * r["flops_per_second"] / ceiling for m, r in zip(measured, results, strict=True)]
    axes.plot(sizes, measured, color=_COLOURS["fivefold"], marker="o", markersize=3, label="measured")
    axes.plot(sizes, bound, color="#d1622b", linestyle=(0, (2, 2)), label="model FLOPs at a large product's rate")
    axes.set_xscale("log", base=2)
    axes.set_xlabel(_SWEEPS[kind])
    axes.set_ylabel("microseconds a token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
