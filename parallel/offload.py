"""Token-wise swapping and recomputation of activations, after MEMO (arXiv 2407.12117).

A layer is a chain of parts. Most compute each token alone: norms, projections, MLPs, experts. Their tokens are cut in
slices: what backward needs of the first goes to host memory; that of the others is not kept, and made again a slice at
a time. Attention and routing see all tokens: what goes into them is of one or the other kind, what they make themselves
goes to the host whole, as the layer's input does. So a layer is

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernels.rehearsal import stands_for
from parallel.host_link import Block, Link, Moment, Pair, Slab, link_of
from parallel.offload_tensors import Frame, Holder, Item, View, joined_of, pieces_of, restore

GRANULE = 128
"""Tokens of which a cut is a multiple, where there are thousands: tiles of the kernels."""

SLICE = 16384
"""Tokens that are computed again at a time, at most: backward holds no more of them."""


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
    spans: list[tuple[Moment, Moment, str]] = field(default_factory=list)


class Swap:
    """Of one rank's layers, over all micro-batches."""

    def __init__(
        self,
        device: torch.device,
        fraction: float,
        host_bytes: float = float("inf"),
        link: Link | None = None,
    ) -> None:
        """fraction: of each layer's tokens that go to the host, see `parallel.swap`; host_bytes: for all of them."""
        self.device, self.fraction = device, fraction
        self.link = link or link_of(device)
        self.slab = Slab(host_bytes, device.type == "cuda")
        self._events: list[tuple[bool, int]] = []
        self._before: list[tuple[bool, int]] = []
        """Since and until nothing was last in flight: whether a forward pass, and of which visit."""
        self._visits: weakref.WeakValueDictionary[int, Visit] = weakref.WeakValueDictionary()
        """In flight, by number."""
        self._leaving: list[Visit] = []
        self._figures = Figures()
        self._stood_for = GRANULE

    def visit(self, hidden: Tensor, layer: nn.Module) -> Visit:
        """A forward pass of `layer` over hidden states [tokens, ...], which has a backward pass."""
        if not self._visits:
            self._before, self._events = self._events, []
            before, self._stood_for = self._stood_for, stands_for(GRANULE)
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
            else:
                figures.copying += seconds
        figures.spans.clear()
        return figures

    def closed(self, visit: Visit) -> None:
        self._leaving.append(visit)

    def returned(self, visit: Visit) -> None:
        """Its backward pass begins."""
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


@dataclass(eq=False)
class Cut:
    """A tensor of tokens in slices: the first is kept on the host, where there is one, the others recomputed."""

    pieces: tuple[Tensor, ...]
    frames: tuple[Frame, ...]
    """Of the others."""
    at: int
    """Among what the part gave."""
    joined: Tensor | None = None
    """All of them, where a part has seen them so."""


class Visit:
    """One forward pass of one layer over one micro-batch."""

    number: int

    def __init__(self, swap: Swap, hidden: Tensor, layer: nn.Module, stays: bool) -> None:
        self.swap = swap
        self._tokens = len(hidden)
        whole = stands_for(self._tokens)
        cut = int(swap.fraction * whole)
        cut = cut if cut == whole or cut < 32 * GRANULE else cut // GRANULE * GRANULE
        number = -(-(whole - cut) // SLICE)
        cut = min(max(round(cut * self._tokens / whole), bool(cut)), self._tokens - number)
        rest = self._tokens - cut
        evenly = (rest // number + (at < rest % number) for at in range(number))
        self._kept, self._slices = cut, [cut] * bool(cut) + list(evenly)
        """Tokens that go to the host, and tokens of each slice."""
        self._never = {each.untyped_storage().data_ptr() for each in layer.parameters()}
        """Storages that stay where they are: weights, and what comes from outside the layer."""
        self._items: dict[int, Item] = {}
        """By the address of their storage, while all of them are on the device."""
        self._swapped: list[weakref.ref[Item]] = []
        self._joined: list[Cut] = []
        self._outside: list[Tensor] = []
        """Whose addresses are not others' meanwhile."""
        self._block: Block | None = None
        self._stays, self._begun = stays, False
        self._out: Moment | None = None
        self._back: Moment | None = None
        self._is_here = True
        self._own(hidden)

    def by_token(self, compute: Callable[..., Sequence[Tensor]], *given: Tensor | Cut) -> tuple[Cut, ...]:
        """What `compute` gives of tokens alone, tensors of [tokens, ...] all.

        Also of a multiple of the tokens, where hidden states lie on several ranks and the others' have come: then of
        so many runs in turn.
        """
        parts = [self._parts(each) for each in given]
        made: list[Sequence[Tensor]] = []
        frames = []
        for at in range(len(self._slices)):
            pieces = [each[at] for each, _ in parts]
            if at == 0 and self._kept:
                with saved_tensors_hooks(self._keep, restore):
                    made.append(compute(*pieces))
                continue
            sources = [partial(source, at) for _, source in parts]
            frames.append(Frame(compute, list(zip(sources, (each.requires_grad for each in pieces), strict=True))))
            with saved_tensors_hooks(self._pack_into(frames[-1]), restore):
                made.append(compute(*pieces))
        return tuple(Cut(pieces, tuple(frames), at) for at, pieces in enumerate(zip(*made, strict=True)))

    def whole(self, compute: Callable[..., Any], *given: Tensor | Cut) -> Any:
        """What `compute` gives of all tokens: a tensor or several."""
        joined = [self._join(each) if isinstance(each, Cut) else each for each in given]
        for each in joined:
            self._stay(each)
        with saved_tensors_hooks(self._keep, restore):
            made = compute(*joined)
        for each in (made,) if isinstance(made, Tensor) else made:
            self._own(each)
        return made

    def close(self, out: Cut) -> Tensor:
        """The layer's output, all tokens; copies begin."""
        last = joined_of(out.pieces, self._slices)
        for cut in self._joined:
            cut.joined, cut.pieces = None, ()
        self._joined.clear()
        self._outside.clear()
        items = [item for item in self._items.values() if item.is_wanted]
        self._items.clear()
        for item in items:
            if not item.size:
                item.forget()
        items = [item for item in items if item.size]
        self._swapped = [weakref.ref(item) for item in items]
        if self._stays:
            return last
        size = sum(item.size for item in items)
        self._block = self.swap.slab.take(size) if size else None
        if size and self._block is None:
            self.swap.leave_here(size)
            self._stays = True
            return last
        if self._block is not None:
            at, pairs = 0, []
            for item in items:
                pairs += item.place(self._block.bytes[at : at + item.size])
                at += item.size
            self._out = self.swap.send([(host, device) for device, host in pairs], self._block)
        self.swap.closed(self)
        return last

    def leave(self) -> None:
        """Give up the device's memory, unless backward has come."""
        if self._begun or self._stays:
            return
        self._is_here = False
        if self._out is not None:
            self.swap.wait(self._out)
        for item in self._alive():
            item.storage = None

    def bring(self) -> None:
        """Begin to bring back what has left."""
        self._stays = True
        if self._is_here:
            if self._block is not None and self._out is not None:
                self.swap.slab.give(self._block, self._out)
                self._block = None
            return
        self._is_here = True
        pairs = [pair for item in self._alive() for pair in item.allocate(self.swap.device)]
        if self._block is None or self._out is None:
            return
        # What was computed before may still read the device's memory, and the copy out may not be past yet.
        after = [self.swap.link.now(), self._out]
        self._back = self.swap.link.copy(False, pairs, after)[1] if pairs else self._out
        self.swap.slab.give(self._block, self._back)
        self._block = None

    def needed(self) -> None:
        """By backward, now."""
        if not self._begun:
            self._begun = True
            self.bring()
            self.swap.returned(self)
        if self._back is not None:
            self.swap.wait(self._back)
            self._back = None

    def _alive(self) -> Iterator[Item]:
        return (item for reference in self._swapped if (item := reference()) is not None)

    def _own(self, made: Tensor) -> None:
        """Of a whole part, or the layer's input: to the host whole."""
        storage = made.untyped_storage()
        if storage.data_ptr() not in self._items:
            self._items[storage.data_ptr()] = Item(self.needed, storage)

    def _stay(self, given: Tensor) -> None:
        """What comes from outside, and is not the layer's input."""
        address = given.untyped_storage().data_ptr()
        if address not in self._items:
            self._never.add(address)
            self._outside.append(given)

    def _join(self, cut: Cut) -> Tensor:
        if cut.joined is not None:
            return cut.joined
        cut.joined = joined_of(cut.pieces, self._slices)
        cut.pieces = tuple(pieces_of(cut.joined, self._slices))  # else they would be there twice
        self._joined.append(cut)
        storage = cut.joined.untyped_storage()
        if storage.data_ptr() not in self._items:
            item = self._items[storage.data_ptr()] = Item(self.needed, storage)
            if cut.frames:
                for frame in cut.frames:
                    frame.consumers[cut.at] += 1
                item.follow(cut.joined, self._slices, cut.frames, cut.at)
        return cut.joined

    def _parts(self, given: Tensor | Cut) -> tuple[Sequence[Tensor], Callable[[int], Tensor]]:
        """All slices, and what finds one again that is to be computed again."""
        if isinstance(given, Cut):
            frames, at, first = given.frames, given.at, len(given.pieces) - len(given.frames)
            for frame in frames:
                frame.consumers[at] += 1
            return given.pieces, lambda slice_: frames[slice_ - first].output(at)
        self._stay(given)
        slices = self._slices
        pieces = pieces_of(given, slices)
        if given.untyped_storage().data_ptr() in self._never:
            alone = [piece.detach() for piece in pieces]
            return pieces, alone.__getitem__
        if self._kept == self._tokens:
            return pieces, pieces.__getitem__
        saved = self._keep(given.detach())
        return pieces, lambda slice_: pieces_of(restore(saved), slices)[slice_]

    def _keep(self, tensor: Tensor) -> Any:
        """What autograd saves of tokens that go to the host."""
        if self._is_outside(tensor):
            return tensor
        storage = tensor.untyped_storage()
        item = self._items.get(storage.data_ptr())
        if item is None:
            item = self._items[storage.data_ptr()] = Item(self.needed, storage)
        item.is_wanted = True
        return View(item, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _pack_into(self, frame: Frame) -> Callable[[Tensor], Any]:
        """What autograd saves of the others, which `frame` computes again."""

        def pack(tensor: Tensor) -> Any:
            if self._is_outside(tensor):
                frame.holders.append(None)
                return tensor
            holder = Holder(self.needed, frame)
            frame.holders.append(weakref.ref(holder))
            return holder

        return pack

    def _is_outside(self, tensor: Tensor) -> bool:
        return (
            tensor.device.type != self.swap.device.type
            or not tensor.numel()
            or tensor.untyped_storage().data_ptr() in self._never
        )
