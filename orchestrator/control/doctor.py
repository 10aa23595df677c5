"""Whether an environment can train: looked at from outside, without importing the engines."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.errors import InputError
from kernels.compiler import c_compiler
from orchestrator.control.cluster import local_gpus
from orchestrator.run_folder import RunFolder

_OURS = ("orchestrator", "parallel", "models", "kernels", "jobs")
_PINNED = {"megatron-core": "0.16.1", "deepspeed": "0.19.8", "ray": "2.60.0"}
_LOW_DISK_BYTES = 10e9


@dataclass(frozen=True)
class Finding:
    name: str
    good: bool
    text: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def examine(run_root: str) -> list[Finding]:
    return [_python(), _packages_together(), *_versions(), _torch(), _devices(), *_kernels(), _disk(run_root)]


def healthy(findings: list[Finding]) -> bool:
    return all(finding.good for finding in findings)


def show(findings: list[Finding]) -> None:
    for finding in findings:
        print(f"{'ok  ' if finding.good else 'BAD '} {finding.name:<14} {finding.text}")
        if finding.remedy and not finding.good:
            print(f"{'':<20}{finding.remedy}")


def stray_packages() -> list[str]:
    """Fivefold's top-level packages that resolve elsewhere: PyPI has others of these names, which overwrite them."""
    home = Path(__file__).resolve().parents[2]
    strays = []
    for name in _OURS:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != home:
            strays.append(f"{name} ({origin})")
    return strays


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "python", (3, 11) <= sys.version_info[:2] <= (3, 12), version, "Fivefold runs on Python 3.11 and 3.12"
    )


def _packages_together() -> Finding:
    strays = stray_packages()
    text = "its five packages lie beside one another" if not strays else f"resolve elsewhere: {', '.join(strays)}"
    return Finding("packages", not strays, text, "give Fivefold an environment of its own")


def _versions() -> list[Finding]:
    found = []
    for name, wanted in _PINNED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, "is not installed", "pip install 'fivefold[train]'"))
            continue
        found.append(Finding(name, version == wanted, f"{version} (wanted: {wanted})", f"pip install {name}=={wanted}"))
    return found


def _torch() -> Finding:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torch", False, "is not installed", "pip install 'fivefold[train]'")
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return Finding("torch", release >= (2, 11), f"{version} (wanted: 2.11 or newer)", "pip install 'torch>=2.11'")


def _devices() -> Finding:
    return Finding("devices", True, f"{os.cpu_count()} CPU cores, {local_gpus()} GPUs")


def _kernels() -> list[Finding]:
    """On a machine with GPUs: whether their kernels can be compiled."""
    if not local_gpus():
        return []
    if importlib.util.find_spec("triton") is None:
        return [Finding("kernels", False, "Triton is not installed: training is slow", "pip install triton")]
    compiler = c_compiler()
    remedy = "apt-get install gcc, or name a compiler in CC"
    return [Finding("kernels", bool(compiler), f"Triton with {compiler or 'no C compiler: training is slow'}", remedy)]


def _disk(run_root: str) -> Finding:
    try:
        local = RunFolder(run_root).local
    except InputError as error:
        return Finding("run root", False, str(error), "name another with --run-root or FIVEFOLD_RUN_ROOT")
    if local is None:
        return Finding("run root", True, run_root)
    existing = next(place for place in (local, *local.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    text = f"{local}, {free / 1e9:.0f} GB free" + ("" if writable else ", not writable")
    return Finding(
        "run root", writable and free > _LOW_DISK_BYTES, text, "free some room, or name another with --run-root"
    )
