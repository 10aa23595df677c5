"""A step of an MoE model as a trace of tensors: who is made by which operation, and read last by which."""

from __future__ import annotations

from random import Random

from parallel.memory_plan import Request

HIDDEN, QUERIES, KEYS, FFN, TOP_K, EXPERTS = 2048, 4096, 1024, 1536, 8, 128
TOKENS = 8192


class Trace:
    """Operations one after another; a tensor is a number."""

    def __init__(self) -> None:
        self.step = 0
        self.made: list[list[int]] = []

    def __call__(self, read: tuple[int, ...], *sizes: int) -> tuple[int, ...]:
        """An operation that reads tensors and makes others of so many bytes."""
        self.step += 1
        for tensor in read:
            self.made[tensor][2] = self.step
        self.made += [[size, self.step, self.step] for size in sizes]
        return tuple(range(len(self.made) - len(sizes), len(self.made)))

    def requests(self) -> list[Request]:
        return [Request(str(name), *made) for name, made in enumerate(self.made)]


Kept = tuple[int, ...]


def forward(trace: Trace, hidden: int, rows: int) -> tuple[int, Kept]:
    """A layer whose experts receive `rows` rows: its output, and what backward reads."""
    wide, per_row = 2 * TOKENS * HIDDEN, 2 * rows * HIDDEN
    normed, scale = trace((hidden,), wide, 4 * TOKENS)
    (projected,) = trace((normed,), 2 * TOKENS * (QUERIES + 2 * KEYS))
    query, key, value = trace((projected,), 2 * TOKENS * QUERIES, 2 * TOKENS * KEYS, 2 * TOKENS * KEYS)
    attended, sums = trace((query, key, value), 2 * TOKENS * QUERIES, 128 * TOKENS)
    (output,) = trace((attended,), wide)
    (middle,) = trace((hidden, output), wide)
    routed, second = trace((middle,), wide, 4 * TOKENS)
    (logits,) = trace((routed,), 4 * TOKENS * EXPERTS)
    weights, chosen = trace((logits,), 4 * TOKENS * TOP_K, 8 * TOKENS * TOP_K)
    (sent,) = trace((routed, chosen), per_row)
    (gates,) = trace((sent,), 4 * rows * FFN)
    (active,) = trace((gates,), 2 * rows * FFN)
    (down,) = trace((active,), per_row)
    (merged,) = trace((down, weights, chosen), wide)
    (out,) = trace((middle, merged), wide)
    kept = hidden, normed, scale, query, key, value, attended, sums, middle, routed, second, logits, weights, chosen
    return out, (*kept, sent, gates, active, down)


def backward(trace: Trace, gradient: int, kept: Kept, rows: int) -> int:
    """The gradient of a layer's input."""
    hidden, normed, scale, query, key, value, attended, sums, middle, routed, second, logits, weights, chosen = kept[
        :14
    ]
    sent, gates, active, down = kept[14:]
    wide, per_row = 2 * TOKENS * HIDDEN, 2 * rows * HIDDEN
    of_down, of_weights = trace((gradient, down, weights, chosen), per_row, 4 * TOKENS * TOP_K)
    (of_active,) = trace((of_down, active), 2 * rows * FFN)
    (of_gates,) = trace((of_active, gates), 4 * rows * FFN)
    (of_sent,) = trace((of_gates, sent), per_row)
    (of_logits,) = trace((of_weights, logits), 4 * TOKENS * EXPERTS)
    (of_routed,) = trace((of_sent, of_logits, routed), wide)
    (of_middle,) = trace((of_routed, middle, second, gradient), wide)
    (of_attended,) = trace((of_middle,), 2 * TOKENS * QUERIES)
    read = of_attended, query, key, value, attended, sums
    of_heads = trace(read, 2 * TOKENS * QUERIES, 2 * TOKENS * KEYS, 2 * TOKENS * KEYS)
    (of_projected,) = trace(of_heads, 2 * TOKENS * (QUERIES + 2 * KEYS))
    (of_normed,) = trace((of_projected, normed), wide)
    return trace((of_normed, hidden, scale, of_middle), wide)[0]


def step(layers: int, vocab: int = 32_000, seed: int = 0) -> list[Request]:
    """Forward and backward of one micro-batch; experts' rows differ from layer to layer."""
    trace, random = Trace(), Random(seed)
    (hidden,) = trace((), 2 * TOKENS * HIDDEN)
    kept = []
    for _ in range(layers):
        rows = int(TOKENS * TOP_K * random.uniform(0.7, 1.4))
        hidden, each = forward(trace, hidden, rows)
        kept.append((each, rows))
    (logits,) = trace((hidden,), 2 * TOKENS * vocab)
    (of_logits,) = trace((logits,), 4 * TOKENS * vocab)
    (gradient,) = trace((of_logits, hidden), 2 * TOKENS * HIDDEN)
    for each, rows in reversed(kept):
        gradient = backward(trace, gradient, each, rows)
    return trace.requests()
