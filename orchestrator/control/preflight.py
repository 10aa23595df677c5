"""Which nodes are not to be trusted with a run, by what they measured before it. Pure.

A node is held against its peers, of which it takes two others to say who is wrong; alone, only against what no sound
node does.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

_SLOWER = 0.7
"""Share of its peers' median rate below which a node is suspect."""
_RATES = {"gflops": "computes", "copied_gb_s": "copies in memory", "written_mb_s": "writes to its disk"}
_DISKS_SLOWER = 0.1
"""Disks differ more, and are written to seldom."""
_LEAST_FREE = 0.8
_CLOCKS_APART_SECONDS = 5.0


def text(found: Mapping[str, Any]) -> str:
    """`51 GFLOP/s, copies 8.9 GB/s, writes 480 MB/s`."""
    rates = f"{found['gflops']:,.0f} GFLOP/s, copies {found['copied_gb_s']:.1f} GB/s"
    return f"{rates}, writes {found['written_mb_s']:,.0f} MB/s"


def suspects(nodes: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, str]:
    """By node, what is wrong with it. now: Unix seconds here, when the last had answered."""
    wrong: dict[str, str] = {}
    for node, found in nodes.items():
        if found["free_memory"] < _LEAST_FREE:
            wrong[node] = f"{1 - found['free_memory']:.0%} of a device's memory is taken by something else"
        elif found["at"] - now > _CLOCKS_APART_SECONDS:
            wrong[node] = f"its clock is {found['at'] - now:.1f} s ahead"
        for rate, does in _RATES.items():
            others = [each[rate] for name, each in nodes.items() if name != node]
            share = _DISKS_SLOWER if rate == "written_mb_s" else _SLOWER
            if len(others) > 1 and found[rate] < share * median(others):
                wrong.setdefault(node, f"it {does} at {found[rate] / median(others):.0%} of its peers' rate")
    return wrong
