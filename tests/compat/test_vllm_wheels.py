"""The contract tests against the sources of every vLLM that pyproject.toml allows for GPUs.

Only one vLLM can be installed, and on a machine without a GPU it is the CPU build. Here the wheels are
fetched, their Python files are put before the installed package, and the tests of the contract run on them.
Nothing is installed. The rest of the environment stays as it is, so this does not show what another torch
would change.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = ("0.32.0", "0.33.0")
CONTRACT = ("tests/compat/test_vllm.py", "tests/rollout/test_nccl_transport.py")
LIMIT_S = 1200


def fetched(version: str, folder: Path) -> Path:
    """Return a folder with the Python files of a version's wheel."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    outcome = subprocess.run([*command, f"vllm=={version}"], capture_output=True, text=True, timeout=LIMIT_S)
    if outcome.returncode != 0:
        pytest.skip(f"the wheel cannot be fetched here: {outcome.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(
            folder / "source",
            [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")],
        )
    wheel.unlink()
    return folder / "source"


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("vllm") is None,
    reason="without an installed vLLM its requirements are not there either",
)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_contract_holds_with(version: str, tmp_path: Path) -> None:
    source = fetched(version, tmp_path)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(source), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    }
    origin = "import vllm; print(vllm.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", origin], env=environment, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert found.stdout.splitlines()[-1].startswith(str(source)), found.stdout + found.stderr
    outcome = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *CONTRACT],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert outcome.returncode == 0, f"vLLM {version}:\n{outcome.stdout[-8000:]}"


def test_every_minor_version_that_is_allowed_is_compared() -> None:
    requirement = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert requirement["vllm"] == ["vllm>=0.32,<0.34; sys_platform == 'linux'"], (
        "the range of vLLM has changed: change VERSIONS with it"
    )
