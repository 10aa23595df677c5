"""A plan as a page: memory by part of each pipeline stage, and the timeline of one step. SVG, without any library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from html import escape

from jobs.spec import JobSpec
from orchestrator.control.display import bytes_text
from parallel.estimates.hardware import Hardware
from parallel.estimates.memory import stage_memory
from parallel.planning.planner import Plan, step_of
from parallel.planning.timeline import Box, timeline

_WIDTH, _LEFT, _RIGHT, _ROW, _GAP = 1120, 80, 130, 26, 6
_PLOT = _WIDTH - _LEFT - _RIGHT
_COLOURS = ("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#9c755f", "#bab0ac")
_FORWARD, _BACKWARD, _AFTER = "#4e79a7", "#76b7b2", "#edc948"
_AT_THE_END = ("data", "optimizer", "offload", "fixed")
"""Parts of a step's time that follow its schedule."""
_STYLE = """body{font:14px/1.5 system-ui,sans-serif;color:#222;max-width:1160px;margin:2em auto;padding:0 1em}
h1{font-size:20px}h2{font-size:16px;margin-top:2em}svg{display:block;font-size:12px}
.key{display:inline-block;margin-right:1.2em}.key i{display:inline-block;width:.8em;height:.8em;margin-right:.4em}"""


def page(job: JobSpec, plan: Plan, device: Hardware) -> str:
    """The whole HTML document."""
    cluster = job.cluster
    title = f"{job.name} at {plan.label} on {cluster.devices} {cluster.hardware}"
    facts = f"micro-batch {plan.micro_batch}, {plan.micro_batches} a step; {plan.time.total * 1e3:,.0f} ms a step"
    body = [f"<h1>{escape(title)}</h1><p>{facts}</p>", *_memory(job, plan, device), *_timeline(job, plan)]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _memory(job: JobSpec, plan: Plan, device: Hardware) -> Iterator[str]:
    """A bar a stage, with a line where the device's memory ends."""
    stages = stage_memory(step_of(job, plan), device)
    longest = max(device.memory_bytes, *(stage.total for stage in stages))
    colours = dict(zip(asdict(stages[0]), _COLOURS, strict=False))
    yield "<h2>Memory of a device, by pipeline stage</h2>"
    yield _legend(colours)
    height = len(stages) * (_ROW + _GAP)
    yield _svg(height + 18)
    for index, stage in enumerate(stages):
        top, left = index * (_ROW + _GAP), float(_LEFT)
        yield _text(0, top, f"stage {index}")
        for name, size in asdict(stage).items():
            width = _PLOT * size / longest
            label = f"{name}: {bytes_text(size)}"
            yield f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_ROW}" fill="{colours[name]}">'
            yield f"<title>{label}</title></rect>"
            left += width
        yield _text(left + 6, top, bytes_text(stage.total))
    limit = _LEFT + _PLOT * device.memory_bytes / longest
    yield f'<path d="M{limit:.1f} 0V{height}" stroke="#222" stroke-dasharray="4 3"/>'
    yield f'<text x="{limit:.1f}" y="{height + 12}" text-anchor="middle">{bytes_text(device.memory_bytes)}</text></svg>'


def _timeline(job: JobSpec, plan: Plan) -> Iterator[str]:
    """A row a stage, as long as the step is predicted to take; of a micro-batch's work, backward is two thirds.

    Recomputed whole, backward is three quarters.
    """
    layout, parts = plan.layout, asdict(plan.time)
    after = sum(parts.get(name, 0.0) for name in _AT_THE_END)
    passes = plan.micro_batches * layout.vpp
    work = (plan.time.total - after) / (passes + layout.pp - 1)
    backward = work * (3 / 4 if plan.options["recompute"] == "full" else 2 / 3)
    boxes = timeline(layout.pp, layout.vpp, plan.micro_batches, work - backward, backward)
    scheduled = max(box.end for box in boxes)
    scale = _PLOT / (scheduled + after)
    idle = 1 - work * passes / scheduled
    yield f"<h2>One step: {scheduled * 1e3:,.0f} ms of schedule, {idle:.1%} of it idle, then {after * 1e3:,.0f} ms</h2>"
    yield _legend({"forward": _FORWARD, "backward": _BACKWARD, "gradients reduced, optimizer": _AFTER})
    height = layout.pp * (_ROW + _GAP)
    yield _svg(height)
    for stage in range(layout.pp):
        yield _text(0, stage * (_ROW + _GAP), f"stage {stage}")
        for kind, colour in (("forward", _FORWARD), ("backward", _BACKWARD)):
            for chunk in range(layout.vpp):
                mine = [box for box in boxes if (box.stage, box.chunk, box.kind) == (stage, chunk, kind)]
                # Later virtual stages are paler.
                yield _boxes(mine, scale, colour, 1 - 0.6 * chunk / layout.vpp)
    left, width = _LEFT + scheduled * scale, after * scale
    yield f'<rect x="{left:.2f}" y="0" width="{width:.2f}" height="{height - _GAP}" fill="{_AFTER}"/></svg>'
    yield "<p>Stages are drawn equally long; virtual stages paler the later they come.</p>"


def _boxes(boxes: list[Box], scale: float, colour: str, opacity: float) -> str:
    """All of one kind in one path, since there may be tens of thousands."""
    top = boxes[0].stage * (_ROW + _GAP)
    drawn = "".join(
        f"M{_LEFT + box.start * scale:.2f} {top}h{(box.end - box.start) * scale:.2f}v{_ROW}"
        f"h{(box.start - box.end) * scale:.2f}z"
        for box in boxes
    )
    edge = 'stroke="#fff" stroke-width="0.5"' if (boxes[0].end - boxes[0].start) * scale > 3 else ""
    return f'<path d="{drawn}" fill="{colour}" fill-opacity="{opacity:.2f}" {edge}/>'


def _legend(colours: dict[str, str]) -> str:
    keys = (f'<span class="key"><i style="background:{colour}"></i>{name}</span>' for name, colour in colours.items())
    return f"<p>{''.join(keys)}</p>"


def _svg(height: int) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="100%">'


def _text(left: float, top: int, text: str) -> str:
    return f'<text x="{left:.1f}" y="{top + _ROW - 8}">{text}</text>'
