"""What the tree promises of itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from orchestrator.control import doctor

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "parallel", "models", "kernels", "jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def requirements(extra: str) -> dict[str, str]:
    """Version specifiers by name: `{"ray": "==2.60.0"}`."""
    found = {}
    for requirement in PROJECT["optional-dependencies"][extra]:
        at = next(index for index, sign in enumerate(requirement) if sign in "<>=!~")
        found[requirement[:at].partition("[")[0]] = requirement[at:]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_are_there_and_empty(package: str) -> None:
    folders = {path.parent for path in MODULES if path.relative_to(ROOT).parts[0] == package}
    assert folders
    assert {folder: (folder / "__init__.py").read_text() for folder in folders} == dict.fromkeys(folders, "")


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_the_doctor_looks_for_what_is_pinned() -> None:
    train = requirements("train")
    pinned = {name: version.removeprefix("==") for name, version in train.items() if version.startswith("==")}
    assert pinned == doctor._PINNED
    assert train["torch"] == ">=2.11"
    assert "wanted: 2.11 or newer" in doctor._torch().text


def test_the_doctor_wants_the_pythons_that_the_package_wants() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    remedy = doctor._python().remedy
    assert remedy == "Fivefold runs on Python 3.11 and 3.12"


def test_the_packages_resolve_beside_one_another() -> None:
    assert set(doctor._OURS) == set(PACKAGES)
    assert doctor.stray_packages() == []
