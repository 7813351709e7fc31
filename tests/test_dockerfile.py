"""The image cannot be built here, so what can be wrong in its files without a build is tested."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The extras that the header of requirements.lock names.
EXTRAS = ("vllm", "datasets", "math")
KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Every instruction of the Dockerfile with its arguments."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (name, rest.strip()) for name, _, rest in (line.partition(" ") for line in whole.split("\n") if line)
    ]


def lock() -> dict[str, Version]:
    """The version of each package in the lock, by its canonical name."""
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")
    ]
    pins = [re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", line) for line in lines]
    unpinned = [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    assert not unpinned, unpinned
    versions = {canonicalize_name(pin[1]): Version(pin[2]) for pin in pins if pin}
    assert len(versions) == len(lines)
    return versions


def arguments_of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_instructions_are_known_and_the_base_comes_first() -> None:
    assert {name for name, _ in instructions()} <= KNOWN
    assert instructions()[0][0] == "FROM"
    (entrypoint,) = arguments_of("ENTRYPOINT")
    assert json.loads(entrypoint)[0] in PROJECT["scripts"]


def test_the_base_is_one_release_of_a_python_that_the_project_supports() -> None:
    (base,) = arguments_of("FROM")
    release = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-bookworm", base)
    assert release, base
    assert Version(release[1]) in SpecifierSet(PROJECT["requires-python"])


def test_what_is_copied_exists_and_suffices_to_build() -> None:
    copied = [source for rest in arguments_of("COPY") for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied), copied
    # What pyproject.toml reads from the folder in which the package is built.
    assert {"pyproject.toml", "src", PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)


@pytest.mark.parametrize(
    "requirement",
    [
        *PROJECT["dependencies"],
        *(part for extra in EXTRAS for part in PROJECT["optional-dependencies"][extra]),
    ],
)
def test_the_lock_is_in_the_ranges_of_pyproject(requirement: str) -> None:
    parsed = Requirement(requirement)
    assert lock()[canonicalize_name(parsed.name)] in parsed.specifier


def test_the_lock_holds_what_docs_install_calls_tested() -> None:
    """The table of docs/install.md says which versions ran together."""
    table = (ROOT / "docs" / "install.md").read_text()
    for name in ("torch", "transformers", "lightning", "litdata", "torchmetrics", "jsonargparse", "vllm"):
        assert str(lock()[name]) in table, name


def test_the_lock_can_build_the_package_without_isolation() -> None:
    (build,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    requirement = Requirement(build)
    assert lock()[canonicalize_name(requirement.name)] in requirement.specifier
