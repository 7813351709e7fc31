"""Every file of this repository that a comment, a docstring or a page names exists under that name."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXTS = (
    *(ROOT / "src").rglob("*.py"),
    *(ROOT / "scripts").rglob("*.py"),
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "configs").rglob("*.yaml"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
)
# Files of other projects, and files that a page asks its reader to write.
FOREIGN = {
    "authenticate.py",
    "countdown.py",
    "v1/engine/parallel_sampling.py",
    "vllm/model_executor/model_loader/reload/layerwise.py",
}
NAME = re.compile(r"[\w/]+\.py\b")


def missing(text: str, files: list[str]) -> set[str]:
    """Return the names in a text that no file has, or with which no path ends."""
    return {
        name
        for name in NAME.findall(text)
        if name not in FOREIGN and not any(f"/{file}".endswith(f"/{name.lstrip('/')}") for file in files)
    }


def test_a_stale_name_is_found() -> None:
    assert missing("see rows.py, packing/rows.py and old_rows.py", ["src/packing/rows.py"]) == {"old_rows.py"}


def test_every_named_file_exists() -> None:
    folders = ("src", "scripts", "benchmarks", "tests", "examples")
    files = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    stale = {
        str(path.relative_to(ROOT)): names
        for path in TEXTS
        if (names := missing(path.read_text(encoding="utf-8"), files))
    }
    assert stale == {}
