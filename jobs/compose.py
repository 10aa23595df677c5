"""From a job's name and overrides to a frozen JobSpec. The only file that imports hydra.

`conf/` holds one folder a group; a file of `conf/job` picks one of each group and adjusts it. A user's own YAML file
has the same form and is given by its path.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from jobs import credentials
from jobs.architecture import Spec
from jobs.errors import CombinedInputError, InputError, closest
from jobs.spec import JobSpec

CONF = Path(__file__).parent / "conf"
GROUPS = ("model", "cluster", "data", "layout", "train", "checkpoint", "policy")


def job_names() -> list[str]:
    return choices("job")


def choices(group: str) -> list[str]:
    """Names that a group offers: the files of its folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose(job: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The spec of a shipped job (`quickstart`) or of a YAML file, with overrides (`layout.tp=2`, `cluster=h200_x8`).

    Raises InputError (several at once where several values are wrong).
    """
    folder, name = _locate(job)
    groups, values = _parse(overrides, folder)
    return validate(_with_values(_hydra(folder, name, groups), values))


def amend(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """A saved spec with overrides: single values (`train.steps=200`) or a whole group (`cluster=h200_x8`)."""
    tree = spec.model_dump(mode="json")
    groups, values = _parse(overrides, CONF)
    for group, choice in groups:
        tree[group] = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
    return validate(_with_values(tree, values))


def validate(tree: dict[str, Any]) -> JobSpec:
    if secrets := [InputError(path, text, credentials.RULE) for path, text in credentials.found(tree)]:
        raise CombinedInputError(secrets)
    try:
        return JobSpec.model_validate(tree)
    except ValidationError as error:
        raise CombinedInputError(_explain(error)) from None


def load(text: str | bytes, source: str) -> JobSpec:
    """The spec of a saved job.json."""
    try:
        return validate(json.loads(text))
    except ValueError as error:
        raise InputError(source, None, f"is not a job spec: {error}") from None


def keys(spec: type[Spec] = JobSpec, prefix: str = "") -> Iterator[str]:
    """Every key of the spec, dotted: what an override may name."""
    for name, field in spec.model_fields.items():
        inner = _nested(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from keys(inner, f"{prefix}{name}.")


def _nested(annotation: Any) -> type[Spec] | None:
    """The group that a field is, or may be; a list of them is one value."""
    if typing.get_origin(annotation) is tuple:
        return None
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Spec):
            return candidate
    return None


def _locate(job: str) -> tuple[Path, str]:
    if job.endswith((".yaml", ".yml")) or "/" in job:
        path = Path(job).expanduser()
        if not path.is_file():
            sibling = closest(path.name, (file.name for file in path.parent.glob("*.yaml")))
            raise InputError("job", job, "no such file", sibling and path.parent / sibling)
        if path.suffix != ".yaml":  # hydra would not find it
            raise InputError("job", job, "is no name of a job file: it ends in .yaml", path.with_suffix(".yaml"))
        return path.parent.resolve(), path.name
    if job not in job_names():
        raise InputError(
            "job",
            job,
            f"is not one of {', '.join(job_names())}, nor the path of a .yaml file",
            closest(job, job_names()),
        )
    return CONF, f"job/{job}"


def _parse(overrides: Sequence[str], folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Choices of groups, and single values: in whatever order they are given, a value adjusts what its group says."""
    pairs = [_split(override) for override in overrides]
    _check_keys(pairs, folder)
    return [pair for pair in pairs if pair[0] in GROUPS], [pair for pair in pairs if pair[0] not in GROUPS]


def _with_values(tree: dict[str, Any], values: list[tuple[str, str]]) -> dict[str, Any]:
    """The tree with single values set. They are YAML; what is none (`*.txt`, `[1`) is taken as text."""
    for key, text in values:
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            node[leaf] = text
    return tree


def _split(override: str) -> tuple[str, str]:
    key, found, value = override.partition("=")
    if not found or not re.fullmatch(r"[a-z0-9_.]+", key):
        raise InputError("override", override, "has the form key=value, like layout.tp=2 or cluster=h200_x8")
    return key, value


def _check_keys(pairs: list[tuple[str, str]], folder: Path) -> None:
    known = [*keys(), *GROUPS]
    errors = []
    for key, value in pairs:
        if key not in known:
            errors.append(InputError(key, value, "no such key", _closest_key(key, known)))
        elif key in GROUPS:
            offered = sorted({*choices(key), *(path.stem for path in (folder / key).glob("*.yaml"))})
            if value not in offered:
                errors.append(InputError(key, value, f"is not one of {', '.join(offered)}", closest(value, offered)))
    if errors:
        raise CombinedInputError(errors)


def _closest_key(key: str, known: list[str]) -> str | None:
    """`nodes` should find `cluster.nodes`, `layout.pt` should find `layout.tp`."""
    same_leaf = [candidate for candidate in known if candidate.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return same_leaf[0] if same_leaf else closest(key, known)


def _hydra(folder: Path, name: str, groups: list[tuple[str, str]]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    source = str(name if folder == CONF else folder / name)
    search = [] if folder == CONF else [f"hydra.searchpath=['file://{CONF}']"]
    chosen = [f"{group}={choice}" for group, choice in groups]
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            composed = hydra_compose(config_name=name, overrides=[*search, *chosen])
            tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{Path(mark.name).name} line {mark.line + 1}: " if mark else ""
        raise InputError(source, None, f"is not YAML: {where}{error.problem}") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(source, None, first_line) from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _explain(error: ValidationError) -> Iterator[InputError]:
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        value = problem["input"]
        if problem["type"] == "extra_forbidden":
            yield InputError(path, value, "no such key", _closest_key(path, list(keys())))
        elif problem["type"] == "missing":
            yield InputError(path, None, "is missing")
        else:
            rule = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
            shown = None if isinstance(value, dict | Spec) else value
            yield InputError(path, shown, rule, _nearest(value, problem.get("ctx", {})))


def _nearest(value: object, context: dict[str, Any]) -> object:
    """The valid value next to a wrong one, from the limits that pydantic says it broke."""
    if "expected" in context:
        choices = re.findall(r"'([^']+)'", context["expected"])
        return closest(str(value), choices) or choices[0]
    if "ge" in context:
        return context["ge"]
    return context["gt"] + 1 if isinstance(context.get("gt"), int) else None
