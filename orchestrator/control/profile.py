"""`fivefold profile`: this machine measured, its profile written, and what differs from the shipped one."""

from __future__ import annotations

import json
import time
from typing import Any

from orchestrator.control.display import print_table
from orchestrator.control.measuring import told, writable
from parallel.estimates.hardware import Hardware, read_profile
from parallel.evidence.machine import Measured, grouped_rate
from parallel.evidence.machine_profile import Machine, collected, differences, document, shipped_for


def measure(out: str, seconds: float, *, quiet: bool) -> dict[str, Any]:
    """Measure for about `seconds`, write the profile to `out`, and tell how it differs. Returns the profile's document.

    InputError where `out` cannot be written, before anything is measured.
    """
    path = writable(out, "is a profile, and ends in .json")
    begun = time.monotonic()
    machine, measured = collected(list(told("profiling", [str(seconds)], quiet=quiet)))
    found = document(machine, measured, time.strftime("%Y-%m-%d"))
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        _show(machine, measured, read_profile(json.dumps(found), out))
        print(f"\n{out}, in {time.monotonic() - begun:.0f} s; plan with it: cluster.hardware={out}")
    return found


def _show(machine: Machine, measured: Measured, here: Hardware) -> None:
    shipped, same = shipped_for(machine)
    print(f"machine  {machine.described}; {machine.count} {'GPUs' if machine.kind == 'cuda' else 'ranks'}")
    if not same:
        print(f"         has no shipped profile; what was not measured is {shipped.name}'s, the nearest")
    for part, why in measured.failed.items():
        print(f"NOT MEASURED  {part}: {why}")
    print()
    rows = []
    for each in differences(here, shipped):
        change = f"{each.here / each.shipped - 1:+.0%}" if each.shipped else ""
        rows.append([each.name, f"{each.shipped:.4g}", f"{each.here:.4g}", change])
    print_table(None, [("", False), (f"shipped {shipped.name}", True), ("here", True), ("differs", True)], rows)
    rate = grouped_rate(measured, here)
    if rate is not None:
        print(f"\ngrouped products run at {rate:.0%} of what this profile predicts of them")
