"""Context parallelism: causal attention over a sequence whose tokens lie on several ranks, and over packed documents.

The sequence is cut into 2 * cp chunks and rank r holds chunks r and 2 * cp - 1 - r, so that all ranks see the same
number of keys (zigzag; Llama 3, Grattafiori et al. 2024, section 3.3.2). Two ways to bring queries and keys together,
which compute the same: all keys and values at once (`gathered_attention`), or in turn (`ring_attention`). Blocks that
no query may see are not computed, and documents are cut out of blocks, so no attention mask is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.attention import attend, attend_backward


def zigzag(sequence: int, cp: int, rank: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Places in the sequence of the tokens that `rank` holds, ascending: int64 [sequence / cp]."""
    chunks = np.arange(sequence).reshape(2 * cp, -1)
    return np.concatenate((chunks[rank], chunks[2 * cp - 1 - rank]))


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, documents: Tensor | None, scale: float
) -> Tensor:
    """Causal attention over the sequence of `group`, with every rank's keys and values gathered first (Llama 3).

    query [batch, heads, sequence / cp, head_dim]; key and value with kv_heads, which divides heads: this rank's zigzag
    chunks. documents: int64 [batch, sequence], on the CPU, ascending along a row, the same on all ranks: a token
    attends to its own document only; None: each row is one. Gives this rank's part of the output, as query.

    Forward: all-gather of keys and values; receives (cp - 1) * (|key| + |value|) elements of the key's precision.
    Backward: reduce-scatter of their gradients; sends as many elements, in fp32 at least.
    """
    out: Tensor = _Gathered.apply(query, key, value, group, _rows(documents), scale)
    return out


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, documents: Tensor | None, scale: float
) -> Tensor:
    """What `gathered_attention` gives, with keys and values passed round (Ring Attention, Liu et al. 2023).

    While a rank computes with one rank's keys and values, it sends them on and receives the next; a rank never holds
    more than two. Over a group of one rank it communicates nothing, and is attention within documents.

    Forward: cp - 1 times, |key| + |value| elements to the next rank.
    Backward: the same again, and cp times their gradients, in fp32 at least.
    """
    out: Tensor = _Ring.apply(query, key, value, group, _rows(documents), scale)
    return out


# Blocks: which queries see which keys.

_Rows = np.ndarray[Any, np.dtype[np.int64]]
_ALL = slice(None)


class _Block(NamedTuple):
    """Each of `queries` sees all of `keys`; if `causal`, which are then of the same tokens, those up to its own.

    Queries are counted along this rank's part of the sequence, keys along the keys at hand.
    """

    queries: slice
    keys: slice
    causal: bool = False
    batch: slice = _ALL


def _gathered_blocks(cp: int, rank: int, chunk: int) -> Iterator[_Block]:
    """Of this rank's two chunks with the keys of the whole sequence. Each query's own key comes first."""
    for place, index in enumerate((rank, 2 * cp - 1 - rank)):
        queries = slice(place * chunk, (place + 1) * chunk)
        yield _Block(queries, slice(index * chunk, (index + 1) * chunk), causal=True)
        if index:
            yield _Block(queries, slice(0, index * chunk))


def _ring_block(rank: int, source: int, chunk: int) -> _Block:
    """Of this rank's two chunks with those of rank `source`.

    Of an earlier rank the first chunk is before both of ours and the second after both; of a later rank both chunks
    are between ours.
    """
    first, second, both = slice(0, chunk), slice(chunk, 2 * chunk), slice(0, 2 * chunk)
    if source == rank:
        return _Block(both, both, causal=True)
    return _Block(both, first) if source < rank else _Block(second, both)


def _within(blocks: Iterable[_Block], of_queries: _Rows | None, of_keys: _Rows | None) -> Iterator[_Block]:
    """The parts of `blocks` whose queries and keys are of one document, given each token's document."""
    for block in blocks:
        if of_queries is None or of_keys is None:
            yield block
            continue
        for row in range(len(of_queries)):
            ours, theirs = of_queries[row, block.queries], of_keys[row, block.keys]
            for document in np.unique(ours):
                queries, keys = _span(ours, document, block.queries), _span(theirs, document, block.keys)
                if keys.start < keys.stop:
                    yield _Block(queries, keys, block.causal, slice(row, row + 1))


def _span(ascending: _Rows, document: int, at: slice) -> slice:
    start, stop = np.searchsorted(ascending, (document, document + 1))
    return slice(at.start + int(start), at.start + int(stop))


def _rows(documents: Tensor | None) -> _Rows | None:
    return None if documents is None else documents.numpy()


# Attention by blocks.


class _Forward:
    """Output and log-sum-exp of this rank's queries over the keys seen so far, in fp32 at least.

    Softmax over two sets of keys is the mean of both softmaxes weighed by exp(lse) (Milakov and Gimelshein 2018).
    """

    def __init__(self, query: Tensor, scale: float) -> None:
        self._query, self._scale = query, scale
        precise = torch.promote_types(query.dtype, torch.float32)
        self.out = query.new_zeros(query.shape, dtype=precise)
        self.lse = query.new_full(query.shape[:-1], -torch.inf, dtype=precise)

    def see(self, blocks: Iterable[_Block], key: Tensor, value: Tensor) -> None:
        """The first block that a query is in must hold a key for it: exp(-inf - -inf) is no number."""
        for block in blocks:
            queries, keys = (block.batch, _ALL, block.queries), (block.batch, _ALL, block.keys)
            out, lse = attend(self._query[queries], key[keys], value[keys], self._scale, causal=block.causal)
            before = self.lse[queries]
            total = torch.logaddexp(before, lse)
            self.out[queries] *= (before - total).exp()[..., None]
            self.out[queries] += out * (lse - total).exp()[..., None]
            self.lse[queries] = total


class _Backward:
    """Gradient of this rank's queries, and of whatever keys and values it is shown."""

    def __init__(self, grad: Tensor, query: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
        self._saved = (grad.contiguous(), query, out, lse)
        self._scale = scale
        self.of_query = torch.zeros_like(out, dtype=lse.dtype)

    def see(self, blocks: Iterable[_Block], key: Tensor, value: Tensor, of_key: Tensor, of_value: Tensor) -> None:
        """Adds the blocks' part to `of_query`, and to of_key and of_value, which are of the keys' shape."""
        for block in blocks:
            queries, keys = (block.batch, _ALL, block.queries), (block.batch, _ALL, block.keys)
            grad, query, out, lse = (saved[queries] for saved in self._saved)
            parts = attend_backward(
                grad, query, key[keys], value[keys], out, lse.contiguous(), self._scale, causal=block.causal
            )
            self.of_query[queries] += parts[0]
            of_key[keys] += parts[1]
            of_value[keys] += parts[2]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: dist.ProcessGroup,
        documents: _Rows | None,
        scale: float,
    ) -> Tensor:
        cp, rank = group.size(), group.rank()
        keys, values = _gather(torch.stack((key, value)), group).unbind()
        of_queries = None if documents is None else documents[:, zigzag(documents.shape[1], cp, rank)]
        blocks = list(_within(_gathered_blocks(cp, rank, query.shape[2] // 2), of_queries, documents))
        merged = _Forward(query, scale)
        merged.see(blocks, keys, values)
        out = merged.out.to(query.dtype)
        ctx.save_for_backward(query, keys, values, out, merged.lse)
        ctx.group, ctx.blocks, ctx.scale = group, blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, out, lse = ctx.saved_tensors
        parts = _Backward(grad, query, out, lse, ctx.scale)
        of_keys = torch.zeros((2, *keys.shape), dtype=lse.dtype, device=keys.device)
        parts.see(ctx.blocks, keys, values, *of_keys)
        of_key, of_value = _scatter(of_keys, ctx.group).to(keys.dtype)
        return parts.of_query.to(query.dtype), of_key, of_value, None, None, None


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-gather of zigzag chunks, [..., sequence / cp, head_dim] -> [..., sequence, head_dim] in order."""
    cp = group.size()
    parts = local.new_empty(cp, *local.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), local.contiguous(), group=group)
    first, second = parts.chunk(2, dim=-2)
    chunks = torch.cat((first, second.flip(0)))
    return chunks.movedim(0, -3).flatten(-3, -2)


def _scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Transpose of `_gather`: reduce-scatter, [..., sequence, head_dim] in order -> [..., sequence / cp, head_dim]."""
    cp = group.size()
    chunks = whole.unflatten(-2, (2 * cp, -1)).movedim(-3, 0)
    parts = torch.cat((chunks[:cp], chunks[cp:].flip(0)), dim=-2).contiguous()
    local = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(local, parts.flatten(0, 1), group=group)
    return local


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: dist.ProcessGroup,
        documents: _Rows | None,
        scale: float,
    ) -> Tensor:
        blocks = _ring_blocks(query.shape[2], group, documents)
        merged = _Forward(query, scale)
        for step, held in enumerate(_passed_round(torch.stack((key, value)), group)):
            merged.see(blocks[step], *held)
        out = merged.out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, merged.lse)
        ctx.group, ctx.blocks, ctx.scale = group, blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        parts = _Backward(grad, query, out, lse, ctx.scale)
        # Gradients follow the keys that they are of, a step behind, and after cp steps are back with their rank.
        arriving: Callable[[], Tensor] | None = None
        for step, held in enumerate(_passed_round(torch.stack((key, value)), ctx.group)):
            of_held = torch.zeros_like(held, dtype=lse.dtype)
            parts.see(ctx.blocks[step], *held, *of_held)
            if arriving is not None:
                of_held += arriving()
            arriving = _send_on(of_held, ctx.group)
        assert arriving is not None
        of_key, of_value = arriving().to(key.dtype)
        return parts.of_query.to(query.dtype), of_key, of_value, None, None, None


def _ring_blocks(local: int, group: dist.ProcessGroup, documents: _Rows | None) -> list[list[_Block]]:
    """The blocks of each step of the ring, for `local` tokens a rank."""
    cp, rank = group.size(), group.rank()
    sources = [(rank - step) % cp for step in range(cp)]
    held = [None if documents is None else documents[:, zigzag(local * cp, cp, source)] for source in sources]
    blocks = [_ring_block(rank, source, local // 2) for source in sources]
    return [list(_within([block], held[0], theirs)) for block, theirs in zip(blocks, held, strict=True)]


def _passed_round(held: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """Each rank's `held` in turn, our own first, then the previous rank's; the next is under way meanwhile."""
    for _ in range(group.size() - 1):
        arriving = _send_on(held, group)
        yield held
        held = arriving()
    yield held


def _send_on(tensor: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Begin to send to the next rank and to receive from the previous one; the function waits, and gives what came.

    Two transfers between the same ranks are matched by their order, which is the same on all ranks.
    """
    if group.size() == 1:
        return lambda: tensor
    received = torch.empty_like(tensor)
    after, before = (dist.get_global_rank(group, (group.rank() + side) % group.size()) for side in (1, -1))
    transfers = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, tensor, after, group), dist.P2POp(dist.irecv, received, before, group)]
    )

    def wait() -> Tensor:
        for transfer in transfers:
            transfer.wait()
        return received

    return wait
