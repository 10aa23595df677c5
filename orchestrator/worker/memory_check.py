"""A run's memory told before its first step, by short rehearsals of it, and checked after it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.messages import RankLaunch
from orchestrator.run_folder import RunFolder
from orchestrator.worker.engines.protocol import Batch, Engine
from orchestrator.worker.host_memory import available_bytes
from orchestrator.worker.reporter import Reporter
from parallel.layout import Layout
from parallel.memory_forecast import Forecast, placed
from parallel.memory_trace import rehearse, tracing

_HOST_SHARE = 0.8
"""Of the memory that is free on the machine, that states of its ranks may be kept in during rehearsals."""

_MICRO_BATCHES = 4
"""That are rehearsed at least, where the step has as many."""


class MemoryCheck:
    """Of one rank. The rank that should need most tells; it writes memory.json."""

    def __init__(self, launch: RankLaunch, layout: Layout, device: torch.device, reporter: Reporter) -> None:
        self._launch, self._layout, self._device, self._reporter = launch, layout, device, reporter
        self._told: dict[str, Any] | None = None
        """What memory.json holds, of the rank that tells."""
        self._forecast = Forecast()

    def rehearse(self, engine: Engine, batches: Sequence[Batch], start: int) -> None:
        """Collective. Run the step after `start` at short lengths, and take back what that changes of the engine."""
        state = engine.state()
        if not self._has_room(state):
            if self._launch.rank == 0:
                why = "the engine's state is not in memory, or the host has no room for a copy of it"
                self._reporter.event("memory_unplanned", f"the peak of a step is not predicted: {why}")
            return
        assert state is not None
        kept = [tensor.to("cpu", copy=True) for tensor in state]
        # By then each stage holds as many as it ever will.
        batches = batches[: max(_MICRO_BATCHES, 2 * self._layout.pp * self._layout.vpp)]
        forecast = rehearse(
            lambda length: engine.train_step(1, 0.0, [_shortened(batch, length) for batch in batches]),
            batches[0].tokens.shape[1],
            grain_of(self._layout),
            self._device,
        )
        with torch.no_grad():
            for tensor, before in zip(state, kept, strict=True):
                tensor.copy_(before)
        engine.restored(start)
        del kept
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._tell(forecast)

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Around the first step, which is measured where it was told."""
        if not self._forecast.peak:
            yield
        elif self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield
            self._compare(torch.cuda.max_memory_allocated())
        else:
            with tracing(self._device) as trace:
                yield
            self._compare(trace.peak)
        self._forecast, self._told = Forecast(), None

    def _has_room(self, state: Sequence[torch.Tensor] | None) -> bool:
        size = math.inf if state is None else sum(each.numel() * each.element_size() for each in state)
        has = size <= _HOST_SHARE * available_bytes() / self._launch.job.cluster.devices_per_node
        everywhere = torch.tensor(int(has))
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere)

    def _tell(self, forecast: Forecast) -> None:
        peaks = [torch.tensor(0) for _ in range(self._layout.world)]
        dist.all_gather(peaks, torch.tensor(forecast.peak))
        self._forecast = forecast if min(peaks) else Forecast()  # or only some would trace the first step
        told = torch.stack(peaks)
        if self._launch.rank != int(told.argmax() if min(peaks) else told.argmin()):
            return
        if not min(peaks):
            self._reporter.event("memory_unplanned", f"the peak of a step is not predicted: {forecast.notice}")
            return
        requests, plan = placed(forecast.requests)
        self._told = {
            "attempt": self._launch.attempt,
            "rank": self._launch.rank,
            "predicted_bytes": forecast.peak,
            "resident_bytes": forecast.resident,
            "measured_bytes": None,
            "placement": {"method": plan.method, "bytes": plan.peak, "bound_bytes": plan.bound, "notice": plan.notice},
            "notice": forecast.notice,
            "requests": [[*one, plan.addresses[one.name]] for one in requests],
        }
        figures = {key: value for key, value in self._told.items() if key != "requests"}
        text = f"peak of a step: {_gb(forecast.peak)} predicted, {_gb(forecast.resident)} of them there before it"
        if requests:
            text += f"; {len(requests):,} tensors placed by {plan.method}, {plan.gap:.1%} above {_gb(plan.bound)} alive"
        if forecast.notice:
            text += f"; {forecast.notice}"
        RunFolder(self._launch.run_folder).write_json("memory.json", self._told)
        self._reporter.event("memory_planned", text, **figures)

    def _compare(self, measured: int) -> None:
        if self._told is None:
            return
        self._told["measured_bytes"] = measured
        error = self._told["predicted_bytes"] / measured - 1
        side = "above" if error >= 0 else "below"
        text = f"peak of the first step: {_gb(measured)} measured, the prediction is {abs(error):.1%} {side} that"
        RunFolder(self._launch.run_folder).write_json("memory.json", self._told)
        self._reporter.event("memory_checked", text, measured_bytes=measured, error=error)


def grain_of(layout: Layout) -> int:
    """That divides the tokens of a sequence wherever the layout divides it."""
    return layout.tp * layout.cp * (2 if layout.cp > 1 else 1)


def _shortened(batch: Batch, length: int) -> Batch:
    """The first tokens of each row; all count, or there might be none that do."""
    tokens, labels = batch.tokens[:, :length], batch.labels[:, :length]
    documents = None if batch.documents is None else batch.documents[:, :length]
    return Batch(tokens, labels, np.ones(tokens.shape, np.float32), documents)


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"
