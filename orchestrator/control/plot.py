"""Pictures of a run: its loss over steps, against what counting tokens alone would score; its ranks; its time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from orchestrator.control.ledger import HEADINGS, Heading

_TRAINING, _VALIDATION, _QUIET = "#1f5a94", "#d1622b", "#6b7280"


def plot_loss(
    metrics: Sequence[dict[str, Any]],
    path: Path | IO[bytes],
    unigram_entropy: float | None,
    restarts: Sequence[int],
) -> None:
    """Write a PNG of training and validation loss (nats a token) over steps.

    metrics: the lines of `metrics.jsonl` in the order they were written, at least `step` and `loss` each; of a step
    that was trained twice the later line counts. restarts: the steps at which attempts ended. Needs matplotlib.
    """
    from matplotlib.figure import Figure  # not pyplot: a controller has no display, and wants no global state
    from matplotlib.ticker import MaxNLocator

    latest = {line["step"]: line for line in metrics}
    lines = [latest[step] for step in sorted(latest)]
    validated = [line for line in lines if line.get("validation_loss") is not None]

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if lines:
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        # A handful of steps is drawn as points too: a line through one is nothing.
        dots = "o" if len(lines) < 30 else None
        last = f"training, last {losses[-1]:.3f}"
        axes.plot(steps, losses, color=_TRAINING, linewidth=1.4, marker=dots, markersize=3, label=last)
    if validated:
        axes.plot(
            [line["step"] for line in validated],
            [line["validation_loss"] for line in validated],
            color=_VALIDATION,
            linestyle="none",
            marker="D",
            markersize=5,
            label=f"validation, last {validated[-1]['validation_loss']:.3f}",
            zorder=3,
        )
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color=_QUIET, linewidth=1.2, label=f"unigram entropy {unigram_entropy:.3f}")
    for number, step in enumerate(sorted(set(restarts))):
        label = None if number else "restart"
        axes.axvline(step, color=_QUIET, linewidth=1, linestyle=(0, (2, 2)), label=label, zorder=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, format="png")


def plot_ranks(lines: Sequence[dict[str, Any]], path: Path | IO[bytes]) -> None:
    """Write a PNG heat map: each rank's (down) time before it waits, over its peers', in windows of steps (across).

    lines: of `ranks.jsonl`, `step` and `slower` (a number a rank; 0.2 is a fifth longer) each; ranks that only some
    have, at another layout, are blank elsewhere.
    """
    from matplotlib.figure import Figure

    ranks = max(len(line["slower"]) for line in lines)
    figure = Figure(figsize=(8, min(12.0, 2.2 + 0.22 * ranks)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    known = [line["slower"] + [float("nan")] * (ranks - len(line["slower"])) for line in lines]
    grid = [[100 * slower[rank] for slower in known] for rank in range(ranks)]
    shown = axes.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-50, vmax=50, interpolation="nearest")
    marked = range(0, len(lines), max(1, len(lines) // 8))
    axes.set_xticks(list(marked), [str(lines[at]["step"]) for at in marked])
    axes.set_yticks(list(range(0, ranks, max(1, ranks // 40))))
    axes.set_xlabel("step")
    axes.set_ylabel("rank")
    figure.colorbar(shown, ax=axes, label="slower than its peers, %")
    figure.savefig(path, format="png")


_OF_HEADING: dict[Heading, str] = {
    "productive": "#1f5a94",
    "rework": "#7ea6cf",
    "stall": "#e3b23c",
    "detect": "#d1622b",
    "restart": "#8c2f39",
    "queue": "#c9cdd3",
}


def plot_ledger(samples: Sequence[dict[str, Any]], path: Path | IO[bytes]) -> None:
    """Write a PNG of where a run's time went: of each stretch between two samples, the share of every heading.

    samples: of `ledger.jsonl`, two or more: totals in seconds by heading, as they were at some moments of the run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    passed = [sum(sample[heading] for heading in HEADINGS) for sample in samples]
    scale, unit = next(
        (seconds, name)
        for seconds, name in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
        if passed[-1] > 2 * seconds or seconds == 1
    )
    widths = [after - before for before, after in pairwise(passed)]
    below = [0.0] * len(widths)
    for heading in HEADINGS:
        spent = [after[heading] - before[heading] for before, after in pairwise(samples)]
        shares = [100 * one / width if width > 0 else 0.0 for one, width in zip(spent, widths, strict=True)]
        total = samples[-1][heading] / passed[-1] if passed[-1] else 0.0
        axes.bar(
            [at / scale for at in passed[:-1]],
            shares,
            [width / scale for width in widths],
            below,
            align="edge",
            color=_OF_HEADING[heading],
            label=f"{heading} {total:.1%}",
        )
        below = [low + share for low, share in zip(below, shares, strict=True)]
    axes.set_xlim(passed[0] / scale, passed[-1] / scale)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"{unit} that the run was active")
    axes.set_ylabel("share of time, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, format="png")
