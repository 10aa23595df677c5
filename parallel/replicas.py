"""Copies of a layer's experts for one micro-batch: there while experts compute, and again while backward does.

The schedule is Hecate's. Copies are brought while attention computes and dropped when the experts have computed; for
backward they are brought again, while the backward pass of the layer above is in its attention; their gradients go back
to the owners behind attention's own backward. Three functions of autograd, which change no value, see to it:

    hidden, *own = replicas.begin(hidden, own, at)     before attention: copies are sent for; backward: their gradients
                                                       have come, and are added to those of the owners' own weights
    rows, *copies = replicas.enter(rows)               before the experts: copies are there; backward: their gradients
                                                       are sent
    out = replicas.leave(out)                          after them: copies are dropped; backward: they are there again
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Lane, Pending, Spread


class Replicas:
    """Of one layer and one micro-batch, on one rank; all ranks of the lane's group have one at a time."""

    def __init__(
        self,
        lane: Lane,
        spread: Mapping[int, Spread],
        owned: Mapping[int, Sequence[Tensor]],
        shapes: Sequence[torch.Size],
        like: Tensor,
        before: Replicas | None,
        stays: bool = False,
    ) -> None:
        """owned: by expert of `spread` that this rank owns, its tensors, of these shapes and `like` one of them.

        before: what the micro-batch's layer below has, whose copies backward wants next. stays: backward comes next,
        and copies are not dropped before it.
        """
        self.experts = tuple(expert for expert, (_, receivers) in sorted(spread.items()) if lane.rank in receivers)
        """That this rank receives."""
        self._lane, self._spread, self._owned, self._before, self._stays = lane, spread, owned, before, stays
        number = len(self.experts)
        self.stacks = [torch.empty(number, *shape, dtype=like.dtype, device=like.device) for shape in shapes]
        """Of each of the experts' tensors, all copies [number of copies, ...]; empty while they are dropped."""
        self._sizes = [stack.untyped_storage().nbytes() for stack in self.stacks]
        self._token = like.new_zeros(0)
        self._at: Mapping[int, int] = {}
        self._gathering: Pending | None = None
        self._reducing: Pending | None = None
        self._sums: dict[int, list[Tensor]] = {}
        self._are_here = False
        self._send_for()

    def begin(self, hidden: Tensor, own: Sequence[Tensor], at: Mapping[int, int]) -> tuple[Tensor, ...]:
        """Gives `hidden` itself and `own`, the stacks of this rank's own experts, which lie there `at` these places."""
        self._at = at
        hidden, self._token, *own = _Begin.apply(hidden, self, *own)
        return hidden, *own

    def enter(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Gives `rows`, and the stacks of copies as backward is to see them."""
        token = self._token
        del self._token  # whose graph knows these replicas: else they would stay until the next collection
        found: tuple[Tensor, ...] = _Enter.apply(rows, token, self)
        return found

    def leave(self, out: Tensor) -> Tensor:
        """Gives `out` itself."""
        left: Tensor = _Leave.apply(out, self)
        return left

    def _bring(self) -> None:
        """Copies are here, whether somebody sent for them or not."""
        self._send_for()
        if self._gathering is not None:
            self._gathering.wait()
            self._gathering = None

    def _send_for(self) -> None:
        if self._are_here:
            return
        for stack, size in zip(self.stacks, self._sizes, strict=True):
            stack.untyped_storage().resize_(size)
        self._gathering = self._lane.all_gather(self._spread, self._owned, self._by_expert(self.stacks))
        self._are_here = True

    def _drop(self) -> None:
        for stack in self.stacks:
            stack.untyped_storage().resize_(0)
        self._are_here = False

    def _give_back(self, gradients: Sequence[Tensor | None]) -> None:
        """Send the copies' gradients to the owners, and for the copies of the layer below."""
        known = [
            torch.zeros_like(stack) if gradient is None else gradient.contiguous()
            for gradient, stack in zip(gradients, self.stacks, strict=True)
        ]
        self._drop()
        self._sums = {expert: [torch.empty_like(one) for one in tensors] for expert, tensors in self._owned.items()}
        self._reducing = self._lane.reduce_scatter(self._spread, self._by_expert(known), self._sums)
        if self._before is not None:
            self._before._wanted_next()

    def _wanted_next(self) -> None:
        if self._reducing is None:
            self._send_for()

    def _returned(self, gradients: Sequence[Tensor]) -> None:
        """To gradients of the stacks given to `begin`, add what copies' gradients come to."""
        assert self._reducing is not None, "copies that were entered in forward are entered in backward"
        self._reducing.wait()
        for expert, totals in self._sums.items():
            for gradient, total in zip(gradients, totals, strict=True):
                gradient[self._at[expert]] += total
        self._sums, self._before = {}, None

    def _by_expert(self, stacks: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Not as tensors that autograd has saved: their contents change behind its back."""
        return {expert: [stack.data[at] for stack in stacks] for at, expert in enumerate(self.experts)}


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, replicas: Replicas, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.replicas = replicas
        return hidden.view_as(hidden), hidden.new_zeros(0), *(stack.view_as(stack) for stack in own)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor, *of_own: Tensor) -> tuple[Tensor | None, ...]:
        ctx.replicas._returned(of_own)  # which are nobody else's: they were made of all that the stacks were used for
        return gradient, None, *of_own


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, replicas: Replicas) -> tuple[Tensor, ...]:
        ctx.replicas = replicas
        ctx.set_materialize_grads(False)
        replicas._bring()
        return rows.view_as(rows), *(stack.data for stack in replicas.stacks)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor, *of_stacks: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.replicas._give_back(of_stacks)
        return of_rows, of_rows.new_zeros(0), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, replicas: Replicas) -> Tensor:
        ctx.replicas = replicas
        if not (replicas._stays or is_backward()):  # where that computes forward again, it wants them next
            replicas._drop()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.replicas._bring()
        return gradient, None


def is_backward() -> bool:
    """Whether this thread is in a backward pass, which may compute forward again."""
    return bool(torch._C._current_graph_task_id() != -1)
