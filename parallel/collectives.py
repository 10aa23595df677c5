"""Collectives of experts: tokens to the ranks that hold theirs, and experts to the ranks that hold a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.placement import Placement


def exchange_rows(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Give each rank of `group` its rows: the first `sent[0]` to rank 0, and so on; get `received[i]` from rank i.

    rows [sum(sent), ...] -> [sum(received), ...], in the order of the ranks they come from.
    Forward: an all-to-all of the rows as they are, nothing padded; a rank sends all but its own part.
    Backward: the same all-to-all of the gradients, the other way.
    """
    way = Way(sent, received, group)
    way.depart(rows)
    return way.arrive()


class Way:
    """`exchange_rows` in two halves: what is computed between them, forward, hides it, and backward hides the way back.

    Forward runs `depart`, other work, `arrive`; backward, which takes what was computed last first, the gradient of
    `arrive`, that of the other work, that of `depart`.
    """

    def __init__(self, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> None:
        self._sent, self._received, self._group = list(map(int, sent)), list(map(int, received)), group

    def depart(self, rows: Tensor) -> None:
        self._token: Tensor = _Depart.apply(rows, self)

    def arrive(self) -> Tensor:
        """What the others sent."""
        token = self._token
        del self._token  # whose graph knows this way: else nothing of both would go before the next collection
        out: Tensor = _Arrive.apply(token, self)
        return out

    def _send(self, rows: Tensor, *, back: bool) -> None:
        sent, received = (self._received, self._sent) if back else (self._sent, self._received)
        self._rows = rows.new_empty(sum(received), *rows.shape[1:])
        self._work = dist.all_to_all_single(self._rows, rows.contiguous(), received, sent, self._group, async_op=True)

    def _come(self) -> Tensor:
        self._work.wait()
        rows = self._rows
        del self._work, self._rows
        return rows


class _Depart(torch.autograd.Function):
    """Gives a token, by which autograd knows the way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, way: Way) -> Tensor:
        ctx.way = way
        way._send(rows, back=False)
        return rows.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.way._come(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return way._come()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.way._send(gradient, back=True)
        return gradient.new_zeros(0), None


class Spread(NamedTuple):
    """Copies of one expert: ranks of a group, the receivers ascending and the owner not among them."""

    owner: int
    receivers: tuple[int, ...]


def spreads(sharded: Placement, placed: Placement, before: Placement | None = None) -> dict[int, Spread]:
    """By expert, the copies that `placed` has beyond `before` (by default beyond `sharded`, whose owners send them)."""
    found = {}
    for expert, (owners, held, there) in enumerate(
        zip(sharded.holders, placed.holders, (before or sharded).holders, strict=True)
    ):
        receivers = tuple(rank for rank in held if rank not in there)
        if receivers:
            found[expert] = Spread(owners[0], receivers)
    return found


Tensors = Mapping[int, Sequence[Tensor]]
"""By expert its tensors: contiguous, of equal shapes wherever it is."""


class Pending:
    """A collective under way."""

    def __init__(self, wait: Callable[[], object], messages: Sequence[dist.P2POp]) -> None:
        self._wait: Callable[[], object] | None = wait
        # Whose memory is not to be given away before; nor is it to be kept for as long as somebody knows of this.
        self._messages = messages
        self.sent = sum(message.tensor.numel() for message in messages if message.op is dist.isend)
        """Elements that this rank sends in it."""

    def wait(self) -> None:
        """On a GPU the current stream waits, not the host. Nothing the second time."""
        if self._wait is not None:
            self._wait()
        self._wait, self._messages = None, ()


class Lane:
    """Runs a group's sparse collectives one after another, beside what its ranks compute and send otherwise.

    It has a process group of its own, with a stream on a GPU and a thread on a CPU. What is begun on one rank is to be
    begun on all, in one order: ranks that run the same schedule do. An expert that goes to several ranks is cut into as
    many pieces: its owner sends each of them one, and they send their pieces to one another. So each copy is received
    once and sent at most once by any rank, and (holders - 1) times the expert's elements are sent in all. Gradients
    come back by the same ways.
    """

    def __init__(self, group: dist.ProcessGroup, lane: dist.ProcessGroup, device: torch.device) -> None:
        """lane: of the same ranks as `group`, and of nothing else's use."""
        self.rank = dist.get_rank(group)
        self._group, self._ranks = lane, dist.get_process_group_ranks(lane)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = None if self._stream else ThreadPoolExecutor(1, "sparse-collectives")
        if self._stream:  # NCCL connects all ranks of a group in its first call, which not all of them may send in
            dist.all_reduce(torch.zeros(1, device=device), group=lane)

    def all_gather(self, spread: Mapping[int, Spread], held: Tensors, into: Tensors) -> Pending:
        """SparseAllGather (Hecate): `held` of owners is written to `into` of receivers. Collective."""
        first, second = [], []
        for expert, (owner, receivers) in sorted(spread.items()):
            if self.rank == owner:
                for tensor in held[expert]:
                    first += [self._send(part, to) for to, part in _parts(tensor, receivers)]
            elif self.rank in receivers:
                for tensor in into[expert]:
                    parts = dict(_parts(tensor, receivers))
                    mine = parts.pop(self.rank)
                    first.append(self._receive(mine, owner))
                    second += [self._send(mine, other) for other in parts]
                    second += [self._receive(part, other) for other, part in parts.items()]

        def run() -> None:
            _exchange_all(first)
            _exchange_all(second)

        return self._begin(run, (*first, *second))

    def reduce_scatter(self, spread: Mapping[int, Spread], gradients: Tensors, into: Tensors) -> Pending:
        """SparseReduceScatter (Hecate): the sum of receivers' `gradients` is written to `into` of owners. Collective.

        In fp32 at least, and in the receivers' order, whichever way it takes.
        """
        first, second, sums = [], [], []
        for expert, (owner, receivers) in sorted(spread.items()):
            if self.rank == owner:
                for tensor in into[expert]:
                    second += [self._receive(part, sender) for sender, part in _parts(tensor, receivers)]
            elif self.rank in receivers:
                for tensor in gradients[expert]:
                    parts = dict(_parts(tensor, receivers))
                    mine = parts[self.rank]
                    others = {other: torch.empty_like(mine) for other in receivers if other != self.rank}
                    first += [self._send(part, to) for to, part in parts.items() if to != self.rank]
                    first += [self._receive(part, sender) for sender, part in others.items()]
                    total = torch.empty_like(mine) if others else mine
                    if others:
                        sums.append((total, [others.get(rank, mine) for rank in receivers]))
                    second.append(self._send(total, owner))

        def run() -> None:
            _exchange_all(first)
            for total, parts in sums:
                precise = torch.promote_types(total.dtype, torch.float32)
                # One after another: a sum over a dimension is in an order that depends on its length.
                total.copy_(sum((part.to(precise) for part in parts[1:]), parts[0].to(precise)))
            _exchange_all(second)

        return self._begin(run, (*first, *second))

    def _send(self, part: Tensor, to: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, part, self._ranks[to], self._group)

    def _receive(self, part: Tensor, sender: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, part, self._ranks[sender], self._group)

    def _begin(self, run: Callable[[], None], messages: Sequence[dist.P2POp]) -> Pending:
        if self._thread is not None:
            under_way: Future[None] = self._thread.submit(run)
            return Pending(under_way.result, messages)
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        done = self._stream.record_event()
        return Pending(lambda: torch.cuda.current_stream().wait_event(done), messages)


def _parts(tensor: Tensor, ranks: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """For each of the ranks a run of the tensor's elements, equally long to within one."""
    flat = tensor.detach().view(-1)
    ends = [len(flat) * number // len(ranks) for number in range(len(ranks) + 1)]
    for number, rank in enumerate(ranks):
        yield rank, flat[ends[number] : ends[number + 1]]


def _exchange_all(messages: Sequence[dist.P2POp]) -> None:
    # Of an expert smaller than its holders are many some parts are empty, on both sides.
    whole = [message for message in messages if message.tensor.numel()]
    if whole:
        for work in dist.batch_isend_irecv(whole):
            work.wait()
