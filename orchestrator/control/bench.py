"""`fivefold bench`: this machine at work by this project's ways and by others', side by side."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from jobs.spec import JobSpec
from orchestrator.control.bench_plot import named, plot
from orchestrator.control.display import bytes_text, print_table
from orchestrator.control.measuring import told, writable
from parallel.evidence.machine_profile import Machine, shipped_for
from parallel.planning.planner import Plan

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "liger-kernel")
"""Whose versions say what was compared."""


def measure(what: str, out: str | None, *, quiet: bool) -> dict[str, Any]:
    """Run the bench called `what`; show its table, and write it to `out` with a plot beside it."""
    return _measured(what, (), {"command": f"fivefold bench {what}"}, out, quiet=quiet)


def train(
    job: JobSpec, plan: Plan, steps: int, asked: Sequence[str], out: str | None, *, quiet: bool
) -> dict[str, Any]:
    """Steps of `job`, whose layout is decided, on this machine's devices. asked: the job's name and overrides."""
    arguments = (job.model_dump_json(), json.dumps(asdict(plan.layout)), str(plan.micro_batch), str(steps))
    command = " ".join(("fivefold bench train", *asked, f"--steps {steps}"))
    about = {"command": command, "layout": plan.label, "micro_batch": plan.micro_batch}
    return _measured("train", arguments, about, out, quiet=quiet)


def _measured(
    what: str, arguments: Sequence[str], about: dict[str, Any], out: str | None, *, quiet: bool
) -> dict[str, Any]:
    path = None if out is None else writable(out, "is a document, and ends in .json")
    lines = []
    for line in told("benches", [what, *arguments], quiet=quiet):
        lines.append(line)
        # Of what takes long and wants a machine that is rarely had, each part is kept as soon as it is known.
        if "result" in line and path is not None:
            path.write_text(json.dumps(_document(what, about, lines), indent=1) + "\n", encoding="utf-8")
    document = _document(what, about, lines)
    if not quiet:
        _show(document)
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        plot(document, path.with_suffix(".png"))
        if not quiet:
            print(f"\n{path}, drawn in {path.with_suffix('.png')}")
    return document


def _document(what: str, about: dict[str, Any], lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    facts = next(line["machine"] for line in lines if "machine" in line)
    ceiling = max((line["ceiling"] for line in lines if "ceiling" in line), default=0.0)
    machine = Machine(facts["device"], facts["kind"], 1, facts["torch"], facts["driver"], facts.get("memory_bytes", 0))
    peak = shipped_for(machine)[0].peak_flops("bf16") if machine.kind == "cuda" else None
    return {
        "bench": what,
        **about,
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"device": machine.described, "python": platform.python_version(), "versions": _versions()},
        "peak_flops": peak,
        "matmul_flops": ceiling,
        "results": [_judged(line["result"], peak, ceiling) for line in lines if "result" in line],
    }


def _judged(result: dict[str, Any], peak: float | None, ceiling: float) -> dict[str, Any]:
    """With the share of the device's peak (MFU), and of what a large product reaches on it."""
    rate = result.get("flops_per_second")
    if rate is None:
        return result
    return result | {"mfu": rate / peak if peak else None, "share_of_matmul": rate / ceiling}


def _show(document: dict[str, Any]) -> None:
    ceiling = document["matmul_flops"]
    unit, of = ("TFLOP/s", 1e12) if ceiling > 1e12 else ("GFLOP/s", 1e9)
    print(f"{document['machine']['device']}; a large product runs at {ceiling / of:,.1f} {unit}\n")
    rows, notes, work = [], [], ""
    for result in document["results"]:
        name = named(result)
        shown = "" if name == work else name
        work = name
        if "differ" in result:
            same = "are equal to the last bit" if not result["differ"] else f"differ in {', '.join(result['differ'])}"
            notes.append(f"{name}: {result['times']} times, {same}")
        elif "failed" in result:
            rows.append([shown, result["way"], f"failed: {result['failed'][:60]}", "", "", "", "", ""])
        else:
            rows.append([shown, result["way"], *_figures(result, of)])
            if "sharing" in result:
                notes.append(_shared(result))
        if longer := result.get("times_as_long"):
            notes.append(f"{result['way']}: {longer:.2f} times as long as the first")
        if beside := result.get("beside_kept"):
            notes.append(f"{result['way']}: peak {beside['peak']:+.1%}, time {beside['seconds']:+.1%} beside all kept")
        if predicted := result.get("predicted_peak_bytes"):
            notes.append(_predicted(result, predicted))
        if notice := result.get("predicted_notice"):
            notes.append(f"{result['way']}: {notice}")
    headings = [("", False), ("", False), ("ms", True), ("10 .. 90%", True), (unit, True), ("MFU", True)]
    print_table(None, [*headings, ("of a product", True), ("peak GB", True)], rows)
    for note in notes:
        print(note)


def _shared(result: dict[str, Any]) -> str:
    """What sharing experts came to, beside what was promised and what the plan said."""
    found, busiest = result["sharing"], result["busiest"]
    took, foreseen = (
        {way: f"{s * 1e3:,.1f}" for way, s in found[of].items()} for of in ("seconds", "predicted_seconds")
    )
    said = f"{named(result)}: {took['ep']} ms by ep, {took['fssdp']} shared"
    said += f" (predicted {foreseen['ep']} and {foreseen['fssdp']}): {found['speedup']:.2f} times as fast"
    said += f" (at least {found['bar']:.2f}: {'met' if found['met'] else 'missed'};"
    said += f" predicted {found['predicted_speedup']:.2f}, {found['error']:+.1%})"
    said += f", busiest rank {found['busiest']['ep']:.2f} of the mean by ep, {busiest['mean']:.2f} shared"
    said += f" and at worst {busiest['worst']:.2f}"
    if found["evened_out"] is not None:
        said += f" (at most {found['busiest_bar']:.1f}: {'met' if found['evened_out'] else 'missed'})"
    return f"{said}, {result['copies']:.1f} copies a layer"


def _figures(result: dict[str, Any], of: float) -> list[str]:
    seconds = result["seconds"]
    rate, mfu, share = (result.get(key) for key in ("flops_per_second", "mfu", "share_of_matmul"))
    peak = seconds["peak_bytes"]
    return [
        f"{seconds['median'] * 1e3:,.2f}",
        f"{seconds['low'] * 1e3:,.2f} .. {seconds['high'] * 1e3:,.2f}",
        f"{rate / of:,.1f}" if rate else "",
        f"{mfu:.1%}" if mfu else "",
        f"{share:.1%}" if share else "",
        f"{peak / 1e9:.2f}" if peak is not None else "",
    ]


def _predicted(result: dict[str, Any], predicted: int) -> str:
    """What rehearsals said of a way's peak, beside what it came to."""
    measured = result["seconds"]["peak_bytes"]
    text = f"{result['way']}: {bytes_text(predicted)} predicted before the first step, "
    text += f"{bytes_text(measured)} measured ({predicted / measured - 1:+.1%})"
    if "placed_gap" in result:
        text += f"; placed by {result['placed_by']} in {bytes_text(result['placed_bytes'])}"
        text += f", {result['placed_gap']:.1%} above the bound"
    return text


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
