"""Long sequences: activations swapped and recomputed by token, beside all kept and beside layers recomputed whole."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jobs.compose import compose
from jobs.spec import JobSpec
from models.megatron_specs import Layer
from orchestrator.worker.benches.layers import forward_backward, loss_of, model_of, set_up
from orchestrator.worker.benches.measure import Timed, seconds
from orchestrator.worker.engines.swapping import by_measured_times
from orchestrator.worker.host_memory import available_bytes
from orchestrator.worker.profiling.timing import tell
from parallel.estimates.swapping import HOST_SHARE
from parallel.host_link import Slab
from parallel.layout import Layout
from parallel.memory_forecast import Forecast, placed
from parallel.memory_trace import rehearse, tracing
from parallel.offload import Swap

SHAPE = ("model=llama3_8b", "model.kv_heads=32", "model.ffn=11008", "model.vocab=32000")
"""Of Llama 2 7B."""
SMALL = ("model.hidden=64", "model.heads=4", "model.kv_heads=4", "model.head_dim=16", "model.ffn=96")
"""For a CPU."""

KEPT, AGAIN, LEAST = "all kept", "layers recomputed", "swapped, 0% of tokens"

FULL = 0.985
"""Of memory, that a step of the longest sequence may take: the allocator's blocks do not fill it all."""

MOST = 0.75
"""Of tokens: a share that leaves more memory than what the link would carry."""


@dataclass(frozen=True)
class Trained:
    """A way to train: a step, and what swaps in it."""

    step: Callable[[], Any]
    short: Callable[[int], Any]
    """A step of its first tokens, so many."""
    swap: Swap | None


def job_of(device: torch.device, layers: int, sequence: int, recompute: str = "none") -> JobSpec:
    small = () if device.type == "cuda" else SMALL
    precision = "bf16" if device.type == "cuda" else "fp32"
    sizes = (f"model.layers={layers}", f"train.sequence_length={sequence}", f"train.precision={precision}")
    return compose("moe_1b", [*SHAPE, *small, *sizes, "layout.micro_batch=1", f"layout.recompute={recompute}"])


def way(job: JobSpec, tokens: Tensor, swap: Swap | None) -> Trained:
    model, loss = model_of(job, tokens)
    for layer in model.modules():
        if isinstance(layer, Layer):
            layer.swap = swap

    def short(length: int) -> None:
        forward_backward(model, loss_of(model, tokens[:, : length + 1]))()

    return Trained(forward_backward(model, loss), short, swap)


def measured_share(job: JobSpec, tokens: Tensor) -> tuple[float, dict[str, float]]:
    """The share of tokens to swap by measured times, and what it follows from."""
    probe = Swap(tokens.device, 0.0, HOST_SHARE * available_bytes())
    trained = way(job, tokens, probe)
    for _ in range(2):  # before the first the order of passes is not known
        probe.take_figures()
        trained.step()
    figures = probe.take_figures()
    plan = by_measured_times(job, Layout(), 0, figures)
    facts = {"link_bytes_per_second": figures.link_bytes_per_second, "layer_seconds": figures.layer_seconds}
    return plan.alpha, facts | {"host_bytes": plan.host_bytes}


def compare(device: torch.device, layers: int, sequence: int) -> Iterator[dict[str, Any]]:
    """A step of each way, one way after another; what swapping waited for and moved in it."""
    job = job_of(device, layers, sequence)
    tokens = set_up(job, device, 1, sequence)
    tell(doing="the link, and a layer")
    share, facts = measured_share(job, tokens)
    slab = Slab(HOST_SHARE * available_bytes(), device.type == "cuda")
    kept: Timed | None = None
    shares = sorted({share, min(share, MOST), 0.0}, reverse=True)
    for name, part in [(KEPT, None), (AGAIN, None), *((f"swapped, {part:.0%} of tokens", part) for part in shares)]:
        free(device)
        swap = None if part is None else Swap(device, part)
        if swap is not None:
            swap.slab = slab  # of all ways, whose pages are pinned once
        trained = way(job_of(device, layers, sequence, "full") if name == AGAIN else job, tokens, swap)
        tell(doing=f"{name}: its peak, by shorter steps")
        forecast = _rehearsed(trained, sequence, device)
        tell(doing=name)
        trained.step()  # its order of passes is not known
        if swap is not None:
            swap.take_figures()
        timed = _measured(trained, device)
        kept = kept or timed
        found = _figures(job, sequence, timed)
        if name != KEPT:
            assert timed.peak_bytes
            assert kept.peak_bytes
            less, longer = timed.peak_bytes / kept.peak_bytes - 1, timed.median / kept.median - 1
            found["beside_kept"] = {"peak": less, "seconds": longer}
        found |= {"work": f"{layers} layers, sequence {sequence:,}", "way": name, **_foretold(forecast)}
        if swap is not None:
            figures = swap.take_figures()
            found |= facts | {"stalled_seconds": figures.stalled, "swapped_bytes": figures.copied}
            found |= {"left_bytes": figures.left, "host_bytes": slab.size}
        yield found
        del trained, swap


def _measured(trained: Trained, device: torch.device) -> Timed:
    """Of one step: its time, and its peak beyond what was there before."""
    if device.type == "cpu":
        with tracing(device) as trace:
            trained.step()
        if trained.swap is not None:
            trained.swap.take_figures()  # those of the timed step are wanted
        took = seconds(trained.step, device)
        return Timed(took, took, took, trace.peak - trace.resident)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = seconds(trained.step, device)
    return Timed(took, took, took, torch.cuda.max_memory_allocated() - before)


def _rehearsed(trained: Trained, sequence: int, device: torch.device) -> Forecast:
    try:
        return rehearse(trained.short, sequence, 1, device)
    except Exception as error:  # of whatever kind: the steps are to be timed all the same
        return Forecast(notice=f"the rehearsal failed: {error!r}")


def _foretold(forecast: Forecast) -> dict[str, Any]:
    """What a step was to need beyond what was there, known before the first; and how little room it could do with."""
    if not forecast.peak:
        return {"predicted_notice": forecast.notice}
    found = {"predicted_peak_bytes": forecast.peak - forecast.resident, "predicted_notice": forecast.notice}
    if forecast.requests:
        plan = placed(forecast.requests)[1]
        found |= {"placed_bytes": plan.peak, "placed_by": plan.method, "placed_gap": plan.gap}
    return found


def longest(device: torch.device, layers: int, unit: int, limit: int, share: float) -> Iterator[dict[str, Any]]:
    """For each way the longest sequence that trains, in units of tokens, as rehearsals foretell its peak; then run.

    In a share of a GPU's memory: time grows with the square of what fits. A CPU runs two units.
    """
    room, first = 0.0, 0
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)
        room = share * torch.cuda.get_device_properties(device).total_memory
    for name, recompute, swaps in ((AGAIN, "full", False), (LEAST, "none", True)):
        lengths = (limit // 16, limit // 8)
        tell(doing=f"{name}: peaks, by shorter steps")
        low, high = (_peak_foretold(device, layers, length, recompute, swaps) for length in lengths)
        slope = (high - low) / (lengths[1] - lengths[0])
        length = min(limit, int((FULL * room - low) / slope + lengths[0]) // unit * unit)
        length = max(length, 2 * unit)
        tell(doing=f"{name}, {length:,} tokens")
        while (found := _once(device, layers, length, recompute, swaps)) is None:
            length -= unit
            tell(doing=f"{name}, {length:,} tokens, since more did not fit")
        result: dict[str, Any] = {
            "work": f"{layers} layers, longest sequence in {share:.0%} of memory",
            "way": f"{name}: {length:,}",
        }
        if first:
            result["times_as_long"] = length / first
        first = first or length
        if found.peak_bytes is not None:
            result["predicted_peak_bytes"] = round(low + slope * (length - lengths[0]))
        yield _figures(job_of(device, layers, length), length, found) | result


def _peak_foretold(device: torch.device, layers: int, sequence: int, recompute: str, swaps: bool) -> int:
    """Bytes of a step, with weights."""
    free(device)
    job = job_of(device, layers, sequence, recompute)
    tokens = set_up(job, device, 1, sequence)
    swap = Swap(device, 0.0, HOST_SHARE * available_bytes()) if swaps else None
    told = rehearse(way(job, tokens, swap).short, sequence, 1, device)
    if not told.peak:
        raise RuntimeError(f"the peak of {sequence:,} tokens cannot be foretold: {told.notice}")
    return told.peak


def _once(device: torch.device, layers: int, sequence: int, recompute: str, swaps: bool) -> Timed | None:
    """A step, the second of two, since the first pins host memory; None where memory runs out."""
    free(device)
    job = job_of(device, layers, sequence, recompute)
    tokens = set_up(job, device, 1, sequence)
    swap = Swap(device, 0.0, HOST_SHARE * available_bytes()) if swaps else None
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        trained = way(job, tokens, swap)
        trained.step()
        took = seconds(trained.step, device)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        return Timed(took, took, took, peak)
    except torch.OutOfMemoryError:
        return None
    finally:
        if swap is not None:
            swap.slab.discard()


def free(device: torch.device) -> None:
    gc.collect()  # models are cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _figures(job: JobSpec, sequence: int, timed: Timed) -> dict[str, Any]:
    flops = job.model.flops_per_token(sequence) * sequence
    return {
        "seconds": vars(timed),
        "flops_per_second": flops / timed.median,
        "tokens_per_second": sequence / timed.median,
        "batch": 1,
        "sequence": sequence,
    }
