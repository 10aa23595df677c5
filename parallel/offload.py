"""Token-wise swapping and recomputation of activations, after MEMO (arXiv 2407.12117).

A layer is a chain of parts. Most compute each token alone: norms, projections, MLPs, experts. Their tokens are cut in
slices: what backward needs of the first ones goes to host memory; that of the others is not kept, and made again a
slice at a time. Attention and routing see all tokens: what goes into them is of one or the other kind, what they make
themselves goes to the host whole, as the layer's input does. So a layer is

    visit = swap.visit(hidden, layer)
    query, key, value = visit.by_token(project, hidden, angles)
    mixed = visit.whole(attend, query, key, value)
    (out,) = visit.by_token(finish, mixed, hidden)
    hidden = visit.close(out)

and autograd sees one graph: whatever it saves meanwhile is taken from it, and given back when it asks. Copies run
beside the layers that follow. A layer's memory is given up when the layer after the next begins, which waits for the
copy: two layers are on the device at most. Backward brings a layer back while what comes before it in the schedule
computes: the order of forward and backward passes is that of the time before, and where it is another, or nothing is
known yet, a layer is brought when it is asked for. One that backward comes to before it would be given up stays.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.rehearsal import stands_for
from parallel.host_link import Block, Link, Moment, Pair, Slab, link_of
from parallel.offload_visit import Visit
from parallel.swap import SLICE

WHOLE = "layer"
"""What is computed again, where it is all of a layer."""


@dataclass
class Figures:
    """Of one rank since they were last taken, seconds and bytes."""

    stalled: float = 0.0
    """That computation waited for copies."""
    copied: int = 0
    """To the host."""
    copying: float = 0.0
    """That these copies took."""
    left: int = 0
    """That stayed on the device since host memory had no place."""
    layers: int = 0
    """Forward passes of one."""
    computing: float = 0.0
    """That these took."""
    host_bytes: float = 0.0
    """There are for copies."""
    spans: list[tuple[Moment, Moment, str]] = field(default_factory=list)

    @property
    def link_bytes_per_second(self) -> float:
        """Where something was copied."""
        return self.copied / self.copying

    @property
    def layer_seconds(self) -> float:
        """Of one's forward pass."""
        return self.computing / self.layers


class Swap:
    """Of one rank's layers, over all micro-batches. Its visits' `parallel.offload_visit.Passes`."""

    def __init__(
        self,
        device: torch.device,
        fraction: float,
        host_bytes: float = float("inf"),
        link: Link | None = None,
        again: Collection[str] = (),
    ) -> None:
        """fraction: of each layer's tokens that go to the host, see `parallel.swap`; host_bytes: for all of them.

        again: what backward computes again of all tokens: `mlp`, `moe`, or WHOLE.
        """
        self.device, self.fraction, self.again, self.slice = device, fraction, again, SLICE
        self.link = link or link_of(device)
        self.slab = Slab(host_bytes, device.type == "cuda")
        self._events: list[tuple[bool, int]] = []
        self._before: list[tuple[bool, int]] = []
        """Since and until nothing was last in flight: whether a forward pass, and of which visit."""
        self._visits: weakref.WeakValueDictionary[int, Visit] = weakref.WeakValueDictionary()
        """In flight, by number."""
        self._leaving: list[Visit] = []
        self._figures = Figures()
        self._stood_for = SLICE

    def recomputed(self, compute: Callable[[Tensor], Any], hidden: Tensor, layer: nn.Module) -> Any:
        """`compute(hidden)`, a layer's forward pass that backward does again: its input alone goes to the host."""
        visit = self.visit(hidden, layer)
        # The kind that saves its input as autograd's functions do, which the visit then takes.
        made = visit.whole(partial(checkpoint, compute, use_reentrant=True, preserve_rng_state=False), hidden)
        visit.depart()
        return made

    def visit(self, hidden: Tensor, layer: nn.Module) -> Visit:
        """A forward pass of `layer` over hidden states [tokens, ...], which has a backward pass."""
        if not self._visits:
            self._before, self._events = self._events, []
            before, self._stood_for = self._stood_for, stands_for(SLICE)
            if self._stood_for != before:
                self.slab.discard()  # blocks of another length
        for early in self._leaving[:-1]:
            early.leave()
        self._leaving = self._leaving[-1:]
        number = sum(is_forward for is_forward, _ in self._events)
        visit = Visit(self, hidden, layer, self._stays(number))
        visit.number = number
        self._visits[number] = visit
        self._came(True, number)
        return visit

    def take_figures(self) -> Figures:
        """Waits for the device."""
        figures, self._figures = self._figures, Figures()
        for begin, end, what in figures.spans:
            seconds = end.seconds_since(begin)
            if what == "stall":
                figures.stalled += seconds
            elif what == "layer":
                figures.layers += 1
                figures.computing += seconds
            else:
                figures.copying += seconds
        figures.spans.clear()
        figures.host_bytes = self.slab.limit
        return figures

    def computed(self, begin: Moment) -> None:
        self._figures.spans.append((begin, self.link.now(), "layer"))

    def closed(self, visit: Visit) -> None:
        self._leaving.append(visit)

    def returned(self, visit: Visit) -> None:
        self._visits.pop(visit.number, None)
        self._came(False, visit.number)

    def wait(self, moment: Moment) -> None:
        begin = self.link.now()
        self.link.wait(moment)
        self._figures.spans.append((begin, self.link.now(), "stall"))

    def send(self, pairs: Sequence[Pair], block: Block) -> Moment:
        after = [self.link.now()] if block.free is None else [self.link.now(), block.free]
        begin, end = self.link.copy(True, pairs, after)
        self._figures.copied += sum(to.numel() for to, _ in pairs)
        self._figures.spans.append((begin, end, "copy"))
        return end

    def leave_here(self, size: int) -> None:
        self._figures.left += size

    def _came(self, is_forward: bool, number: int) -> None:
        at = len(self._events)
        self._events.append((is_forward, number))
        if at + 1 < len(self._before) and self._before[at] == self._events[at]:
            is_forward, number = self._before[at + 1]
            following = self._visits.get(number)
            if not is_forward and following is not None:
                following.bring()

    def _stays(self, number: int) -> bool:
        """Whether at most one other layer's forward pass comes between the visit's own and its backward pass."""
        at = len(self._events)
        if self._before[at : at + 1] != [(True, number)]:
            return False
        following = self._before[at + 1 : at + 5]
        if (False, number) not in following:
            return False
        return sum(is_forward for is_forward, _ in following[: following.index((False, number))]) <= 1
