"""One forward pass of a layer whose activations are swapped and computed again by token: see `parallel.offload`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kernels.rehearsal import stands_for
from parallel.host_link import Block, Link, Moment, Pair, Slab
from parallel.offload_tensors import Frame, Holder, Item, View, joined_of, pieces_of, restore

GRANULE = 128
"""Tokens of which a cut is a multiple, where there are thousands: tiles of the kernels."""


@dataclass(eq=False)
class Cut:
    """A tensor of tokens in slices: the first ones are kept on the host, the others recomputed."""

    pieces: tuple[Tensor, ...]
    frames: tuple[Frame, ...]
    """Of those that are recomputed."""
    at: int
    """Among what the part gave."""
    joined: Tensor | None = None
    """All of them, where a part has seen them so."""


class Passes(Protocol):
    """What the passes of all layers share."""

    device: torch.device
    fraction: float
    slice: int
    """Tokens of one, at most."""
    link: Link
    slab: Slab

    def send(self, pairs: Sequence[Pair], block: Block) -> Moment:
        """To the host; when that has ended."""

    def wait(self, moment: Moment) -> None:
        """What is computed from here on comes after it."""

    def leave_here(self, size: int) -> None:
        """So many bytes stay on the device."""

    def computed(self, begin: Moment) -> None:
        """A layer's forward pass, which began then."""

    def closed(self, visit: Visit) -> None:
        """It may be asked to leave."""

    def returned(self, visit: Visit) -> None:
        """Its backward pass begins."""


class Visit:
    """One forward pass of one layer over one micro-batch."""

    number: int

    def __init__(self, swap: Passes, hidden: Tensor, layer: nn.Module, stays: bool) -> None:
        self.swap = swap
        self._tokens = len(hidden)
        whole = stands_for(self._tokens)
        cut = int(swap.fraction * whole)
        cut = cut if cut == whole or cut < 32 * GRANULE else cut // GRANULE * GRANULE
        kept = _evenly(cut, swap.slice)
        self._kept, self._slices = len(kept), _shrunk(kept + _evenly(whole - cut, swap.slice), self._tokens)
        """How many slices go to the host, and the tokens of each slice."""
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
        self._began = swap.link.now()

    def by_token(
        self, compute: Callable[..., Sequence[Tensor]], *given: Tensor | Cut, again: bool = False
    ) -> tuple[Cut, ...]:
        """What `compute` gives of tokens alone, tensors of [tokens, ...] all; `again`: of all of them once more later.

        Also of a multiple of the tokens, where hidden states lie on several ranks and the others' have come: then of
        so many runs in turn.
        """
        kept = 0 if again else self._kept
        parts = [self._parts(each, kept) for each in given]
        made: list[Sequence[Tensor]] = []
        frames = []
        for at in range(len(self._slices)):
            pieces = [each[at] for each, _ in parts]
            if at < kept:
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

    def beside(self, *given: Tensor) -> None:
        """Parts use these too, which are there when backward comes: weights that came from elsewhere."""
        for each in given:
            self._stay(each)

    def close(self, out: Cut) -> Tensor:
        """The layer's output, all tokens."""
        last = joined_of(out.pieces, self._slices)
        self.depart()
        return last

    def depart(self) -> None:
        """Nothing more is computed: copies begin."""
        self.swap.computed(self._began)
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
            return
        size = sum(item.size for item in items)
        self._block = self.swap.slab.take(size) if size else None
        if size and self._block is None:
            self.swap.leave_here(size)
            self._stays = True
            return
        if self._block is not None:
            at, pairs = 0, []
            for item in items:
                pairs += item.place(self._block.bytes[at : at + item.size])
                at += item.size
            self._out = self.swap.send([(host, device) for device, host in pairs], self._block)
        self.swap.closed(self)

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

    def _parts(self, given: Tensor | Cut, kept: int) -> tuple[Sequence[Tensor], Callable[[int], Tensor]]:
        """All slices, and what finds one again of those behind the first `kept`."""
        if isinstance(given, Cut):
            frames, at, first = given.frames, given.at, len(given.pieces) - len(given.frames)
            for frame in frames[max(0, kept - first) :]:
                frame.consumers[at] += 1
            held = [self._keep(piece.detach()) for piece in given.pieces[kept:first]]
            return (
                given.pieces,
                lambda slice_: frames[slice_ - first].output(at) if slice_ >= first else restore(held[slice_ - kept]),
            )
        self._stay(given)
        slices = self._slices
        pieces = pieces_of(given, slices)
        if given.untyped_storage().data_ptr() in self._never:
            alone = [piece.detach() for piece in pieces]
            return pieces, alone.__getitem__
        if kept == len(slices):
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


def _evenly(tokens: int, most: int) -> list[int]:
    """Tokens of as few slices of `most` as may be, of whole tiles all but the last."""
    number = -(-tokens // most)
    tile = GRANULE if tokens >= 32 * GRANULE and most >= GRANULE else 1
    tiles, rest = divmod(tokens, tile)
    slices = [tile * (tiles // number + (at < tiles % number)) for at in range(number)]
    return [*slices[:-1], slices[-1] + rest] if slices else []


def _shrunk(slices: list[int], tokens: int) -> list[int]:
    """As many slices of fewer tokens, in proportion."""
    whole = sum(slices)
    ends = [round(end * tokens / whole) for end in accumulate(slices)]
    return [end - begin for begin, end in pairwise([0, *ends])]
