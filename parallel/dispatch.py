"""Which tokens fill an expert's places together: where tokens are dropped, what is trained depends on the layout."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from parallel.layout import Layout

Engine = Literal["megatron", "deepspeed"]


def dispatch_groups(
    layout: Layout, micro_batch: int, rows: int, sequence_length: int, engine: Engine = "megatron"
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Number of the dispatch group of each token of a global batch, int64 [rows, sequence_length].

    For `models.reference.Decoder`, to drop what `engine` drops at `layout`. A rank gives out the places of all experts
    among the tokens that its router sees: of one micro-batch, the part of the sequence that cp leaves it, and with
    Megatron's sequence parallelism tp; of DeepSpeed's cp, one run of tokens. `rows` are in the order in which
    micro-batches take them, `micro_batch` at a time.
    Layouts whose groups are alike train alike: those of equal micro_batch, cp and tp. dp, pp, vpp, ep, etp and the
    dispatcher are free, as long as rows keep their company.
    """
    place = np.arange(sequence_length)
    if (
        layout.cp > 1 and engine == "megatron"
    ):  # where each token is in the sequences of the cp ranks, one after another (parallel.context)
        length = sequence_length // (2 * layout.cp)
        chunk, within = np.divmod(place, length)
        rank = np.minimum(chunk, 2 * layout.cp - 1 - chunk)
        place = (2 * rank + (chunk >= layout.cp)) * length + within
    parts = layout.cp * (layout.tp if layout.sp and engine == "megatron" else 1)
    return (np.arange(rows) // micro_batch * parts)[:, None] + place // (sequence_length // parts)
