"""What some verbs need beyond planning: said before anything is created."""

from __future__ import annotations

import importlib.util

from jobs.errors import InputError


def engines() -> None:
    """InputError where this environment cannot train: the two engines come together."""
    modules("training", "torch", "megatron.core", "deepspeed", "ray")


def modules(what: str, *names: str) -> None:
    """InputError where a module that `what` imports is not installed."""
    missing = [name for name in names if not _importable(name)]
    if missing:
        raise InputError("environment", None, f"{what} needs {', '.join(missing)}", "pip install 'fivefold[train]'")


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
