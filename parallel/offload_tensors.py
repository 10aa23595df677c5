"""Tensors that autograd saved and `parallel.offload` took: on the host, or to be computed again."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from parallel.host_link import Pair


class Item:
    """A storage, on the device or with its contents on the host."""

    def __init__(self, needed: Callable[[], None], storage: torch.UntypedStorage) -> None:
        """needed: has it here, and what the device computes from then on after it."""
        self._needed, self.is_wanted = needed, False
        self.storage: torch.UntypedStorage | None = storage
        self._all = storage.nbytes()
        self._runs = [(0, self._all)]
        self._frames: Sequence[Frame] = ()
        self._filled = True
        self._host: Tensor | None = None

    def follow(self, joined: Tensor, slices: Sequence[int], frames: Sequence[Frame], index: int) -> None:
        """Only runs of the first tokens go to the host; the others are the outputs `index` of the frames."""
        runs = len(joined) // sum(slices)
        step, kept = self._all // runs, sum(slices[: len(slices) - len(frames)])
        self._runs = [(run * step, kept * (step // sum(slices))) for run in range(runs)] if kept else []
        self._frames, self._index, self._dtype, self._slices = frames, index, joined.dtype, slices

    @property
    def size(self) -> int:
        """Bytes that go to the host."""
        return sum(length for _, length in self._runs)

    def place(self, host: Tensor) -> list[Pair]:
        """What is copied: from the device, to the host."""
        self._host = host
        assert self.storage is not None
        return self._pairs(self.storage)

    def forget(self) -> None:
        """Nothing of it goes to the host: backward has the frames' outputs in any case."""
        self.storage, self._filled = None, False

    def allocate(self, device: torch.device) -> list[Pair]:
        """New memory, and what is copied: to the device, from the host."""
        self._filled = not self._frames
        if self._runs:
            self.storage = torch.empty(self._all, dtype=torch.uint8, device=device).untyped_storage()
        return self._pairs(self.storage) if self.storage is not None else []

    def read(self) -> torch.UntypedStorage:
        self._needed()
        if not self._filled:
            self._fill()
        assert self.storage is not None, "what left has been brought"
        return self.storage

    def _fill(self) -> None:
        self._filled = True
        if self.storage is None and len(self._slices) == 1:  # the output itself, however it lies in its storage
            self.storage = self._frames[0].output(self._index).untyped_storage()
            return
        whole: Tensor | None = None
        begin = sum(self._slices) - sum(self._slices[-len(self._frames) :])
        for frame, length in zip(self._frames, self._slices[-len(self._frames) :], strict=True):
            tail = frame.output(self._index)
            runs = len(tail) // length
            if whole is None:
                if self.storage is None:
                    self.storage = torch.empty(self._all, dtype=torch.uint8, device=tail.device).untyped_storage()
                whole = torch.empty(0, dtype=self._dtype, device=tail.device).set_(self.storage)
                whole = whole.view(runs, sum(self._slices), -1)
            whole[:, begin : begin + length].copy_(tail.reshape(runs, length, -1))
            begin += length

    def _pairs(self, storage: torch.UntypedStorage) -> list[Pair]:
        assert self._host is not None
        bytes_here = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        pairs, at = [], 0
        for begin, length in self._runs:
            pairs.append((bytes_here[begin : begin + length], self._host[at : at + length]))
            at += length
        return pairs


class View(NamedTuple):
    """A saved tensor, as it lies in its storage."""

    item: Item
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def get(self) -> Tensor:
        storage = self.item.read()
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


class Frame:
    """A part's computation of the tokens that are not kept, which backward does again."""

    def __init__(
        self, compute: Callable[..., Sequence[Tensor]], given: Sequence[tuple[Callable[[], Tensor], bool]]
    ) -> None:
        self._compute, self._given = compute, given
        self.holders: list[weakref.ref[Holder] | None] = []
        """Of all that autograd saved, in its order; None of what is kept."""
        self.consumers: Counter[int] = Counter()
        """Who will ask for each output."""
        self._outputs: dict[int, Tensor] | None = None

    def output(self, index: int) -> Tensor:
        self.recompute()
        assert self._outputs is not None
        self.consumers[index] -= 1
        return self._outputs[index] if self.consumers[index] else self._outputs.pop(index)

    def recompute(self) -> None:
        if self._outputs is not None:
            return
        order = iter(self.holders)

        def capture(tensor: Tensor) -> None:
            reference = next(order)
            if reference is not None and (holder := reference()) is not None:
                holder.tensor = tensor.detach()
            # Nothing is given back, for nobody asks: this graph has no backward pass.

        given = [source().detach().requires_grad_(asks) for source, asks in self._given]
        self._given = ()
        with torch.enable_grad(), saved_tensors_hooks(capture, restore):
            made = self._compute(*given)
        assert next(order, order) is order, "what is computed again saves as many tensors"
        self._outputs = {index: tensor.detach() for index, tensor in enumerate(made) if self.consumers[index]}


class Holder:
    """The place of a tensor that is computed again."""

    tensor: Tensor | None = None

    def __init__(self, needed: Callable[[], None], frame: Frame) -> None:
        self._needed, self._frame = needed, frame

    def get(self) -> Tensor:
        self._needed()
        self._frame.recompute()
        assert self.tensor is not None
        return self.tensor


def restore(saved: Any) -> Tensor:
    found: Tensor = saved if isinstance(saved, Tensor) else saved.get()
    return found


def pieces_of(whole: Tensor, slices: Sequence[int]) -> Sequence[Tensor]:
    """Each run of tokens is cut alike."""
    if len(slices) == 1:
        return (whole,)
    if len(whole) == sum(slices):
        return tuple(whole.split(list(slices)))
    return tuple(part.flatten(0, 1) for part in whole.unflatten(0, (-1, sum(slices))).split(slices, 1))


def joined_of(pieces: Sequence[Tensor], slices: Sequence[int]) -> Tensor:
    """What `pieces_of` takes apart."""
    if len(slices) == 1:
        return pieces[0]
    runs = len(pieces[0]) // slices[0]
    if runs == 1:
        return torch.cat(list(pieces))
    return torch.cat([piece.unflatten(0, (runs, -1)) for piece in pieces], 1).flatten(0, 1)
