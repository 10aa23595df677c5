"""Collectives on a cluster's links, in seconds: the alpha-beta model (Thakur et al. 2005) of each tier."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.estimates.hardware import Hardware, Link


@dataclass(frozen=True)
class Network:
    """The links of a cluster as a group of ranks sees them: `size` ranks, `stride` apart in rank order."""

    hardware: Hardware
    devices_per_node: int

    @property
    def domain(self) -> int:
        """Ranks joined by fast links: a node's, or more where nodes are joined by them too (NVL72)."""
        fast = self.hardware.fast_domain
        return fast if fast > 8 else self.devices_per_node

    def all_gather(self, total_bytes: float, size: int, stride: int) -> float:
        """Ring all-gather to, or reduce-scatter of, `total_bytes` on each rank: (n-1)/n S/B + (n-1) alpha."""
        if size == 1:
            return 0.0
        link = self._ring_link(size, stride)
        steps = (size - 1) * (total_bytes / size / link.bytes_per_second + link.latency_seconds)
        return self.hardware.collective_seconds + steps

    def all_reduce(self, total_bytes: float, size: int, stride: int) -> float:
        """A reduce-scatter and an all-gather in one collective; across nodes latency is a tree's (NCCL 2.4)."""
        if size == 1:
            return 0.0
        link = self._ring_link(size, stride)
        within = min(size, max(1, self.domain // stride))
        hops = 2 * (within - 1) * self.hardware.fast_link.latency_seconds
        if size > within:
            hops += 2 * (-(-size // within) - 1).bit_length() * link.latency_seconds
        return self.hardware.collective_seconds + hops + 2 * (size - 1) / size * total_bytes / link.bytes_per_second

    def all_to_all(self, bytes_per_rank: float, size: int, stride: int, top_k: int = 0) -> float:
        """Each rank sends `bytes_per_rank` in equal parts, within its node on its link, beyond on the network.

        top_k: of how many copies of a token the bytes are, where a node is sent a token once and its devices pass it
        on (DeepEP, HybridEP); 0: each copy is sent. Of k nodes a token's copies reach k (1 - (1 - 1/k)^top_k).
        """
        if size == 1:
            return 0.0
        per_node = max(1, min(size, self.domain // stride))
        nodes = -(-size // per_node)
        inside, outside = self.hardware.fast_link, self.hardware.network_link
        sent_once = nodes * (1 - (1 - 1 / nodes) ** top_k) / top_k if top_k else 1.0
        # Within a node too a token that has several copies on one device is sent to it once.
        within_once = size * (1 - (1 - 1 / size) ** top_k) / top_k if top_k else 1.0
        part = bytes_per_rank / size
        seconds = (per_node - 1) * (part * (nodes if top_k else 1) * within_once / inside.bytes_per_second)
        seconds += (per_node - 1) * inside.latency_seconds
        if nodes > 1:
            crossing = bytes_per_rank * (nodes - 1) / nodes * sent_once / outside.bytes_per_second
            latency = (nodes - 1) * outside.latency_seconds
            seconds = max(seconds, crossing) + latency if top_k else seconds + crossing + latency
        return seconds

    def send(self, sent_bytes: float, stride: int) -> float:
        """One message to the rank `stride` further."""
        link = self.hardware.fast_link if stride < self.domain else self.hardware.network_link
        return sent_bytes / link.bytes_per_second + link.latency_seconds

    def _ring_link(self, size: int, stride: int) -> Link:
        """The slowest link of a ring. Groups that cross nodes at once share every port of a node between them."""
        inside, outside = self.hardware.fast_link, self.hardware.network_link
        if size * stride <= self.domain:
            return inside
        sharing = min(self.devices_per_node, stride)
        bandwidth = outside.bytes_per_second * self.devices_per_node / sharing
        return Link(outside.latency_seconds, min(bandwidth, inside.bytes_per_second))
