"""What makers say of accelerators: enough to tell one by its name, and to find the nearest that has a profile."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """`bf16_flops` is the dense peak (of fp16 where there is no bf16); `profile` the one that describes it."""

    memory_bytes: float
    bf16_flops: float
    profile: str | None = None


_DEVICES: dict[str, Device] = {
    "v100": Device(32e9, 125e12, "v100"),
    "a100": Device(80e9, 312e12, "a100_80gb"),
    "a100 40gb": Device(40e9, 312e12, "a100_40gb"),
    "a100 pcie": Device(80e9, 312e12),
    "a800": Device(80e9, 312e12),
    "h100": Device(80e9, 989.5e12, "h100"),
    "h100 pcie": Device(80e9, 756e12),
    "h100 nvl": Device(94e9, 835e12),
    "h800": Device(80e9, 989.5e12),
    "h20": Device(96e9, 148e12),
    "gh200": Device(96e9, 989.5e12),
    "h200": Device(141e9, 989.5e12, "h200"),
    "h200 nvl": Device(141e9, 835e12),
    "b200": Device(192e9, 2250e12, "b200"),
    "b300": Device(288e9, 2250e12, "b300"),
    "gb200": Device(192e9, 2500e12, "gb200_nvl72"),
    "gb300": Device(288e9, 2500e12, "gb300_nvl72"),
    "a40": Device(48e9, 150e12),
    "a6000": Device(48e9, 155e12),
    "a10": Device(24e9, 125e12),
    "l4": Device(24e9, 121e12),
    "l40s": Device(48e9, 362e12),
    "rtx 4090": Device(24e9, 165e12),
    "rtx 5090": Device(32e9, 209e12),
    "mi250x": Device(128e9, 383e12),
    "mi300x": Device(192e9, 1307e12),
    "mi325x": Device(256e9, 1307e12),
    "910b": Device(64e9, 376e12, "ascend_910b"),
}
"""By words of its name. Datasheets of NVIDIA, AMD and, of the 910B, Huawei; SXM boards where there are several."""


def known(name: str) -> Device | None:
    """The device whose words are in `name`, the most of them; None where there is none.

    `name` is a person's, a table's or a driver's: h100_nvl, GB300 (NVL72), NVIDIA A100-SXM4-40GB. Memory that is named
    is taken for the device's; with other memory than its profile's it has none.
    """
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    words = set(re.sub(r"ascend|(?<=910b)\d", "", text).split())
    named = [key for key in _DEVICES if set(key.split()) <= words]
    if not named:
        return None
    found = _DEVICES[max(named, key=lambda key: len(key.split()))]
    gigabytes = next((int(size[:-2]) for size in words if re.fullmatch(r"\d+gb", size)), None)
    if gigabytes is None or abs(gigabytes * 1e9 - found.memory_bytes) < 0.1 * found.memory_bytes:
        return found
    return replace(found, memory_bytes=gigabytes * 1e9, profile=None)
