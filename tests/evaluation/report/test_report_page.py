from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from synthetic_run import HOSTILE, write_run

from rpt_lightning import cli
from rpt_lightning.evaluation.report.page import json_for_script
from rpt_lightning.evaluation.report.report_command import report

ROOT = Path(__file__).resolve().parents[3]


class Parsed(html.parser.HTMLParser):
    """Collects scripts with their attributes, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.addresses: list[str] = []
        self.policy = ""
        self._script: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "srcset")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "script":
            self.scripts.append((attributes, ""))
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    name = "run <img onerror=alert(1)> & {{ 7*7 }}"
    write_run(folder / name, num_steps=5, num_tasks=2, num_documents=2, hostile=True)
    report([folder / name], output=folder / "deep" / "report.html")
    text = (folder / "deep" / "report.html").read_text(encoding="utf-8")
    return text, Parsed(text)


def test_nothing_is_loaded(page):
    _, parsed = page
    assert parsed.addresses
    assert all(address.startswith(("#", "data:,")) for address in parsed.addresses)
    assert "default-src 'none'" in parsed.policy
    assert not {"unsafe-eval", "http", "*"} & set(re.split(r"[ ;:/]", parsed.policy.replace("'", "")))
    assert "'unsafe-inline'" not in parsed.policy.split("script-src")[1].split(";")[0]


def test_only_our_scripts_may_run(page):
    """There are three kinds of script elements: ours, data, and compressed ones.

    The security policy names ours and, decompressed, Plotly.
    """
    from plotly.offline import get_plotlyjs

    _, parsed = page
    ours = [text for attributes, text in parsed.scripts if "type" not in attributes]
    assert len(ours) == 1
    hashes = re.findall(r"'sha256-([^']+)'", parsed.policy)
    assert hashes == [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (ours[0], get_plotlyjs())
    ]
    types = {attributes.get("type") for attributes, _ in parsed.scripts}
    assert types == {None, "application/json", "text/plain"}


def test_scripts_set_text_only(page):
    _, parsed = page
    (ours,) = [text for attributes, text in parsed.scripts if "type" not in attributes]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|fetch\(|XMLHttpRequest"
        r"|import\(",
        ours,
    )


def test_names_are_text(page):
    text, parsed = page
    assert "<img" not in text
    assert "run &lt;img onerror=alert(1)&gt; &amp; {{ 7*7 }}" in text
    (index,) = [
        json.loads(script) for attributes, script in parsed.scripts if attributes.get("id") == "index"
    ]
    assert index["runs"] == ["run <img onerror=alert(1)> & {{ 7*7 }}"]


def test_json_cannot_end_its_script():
    data = {text: [text] for text in HOSTILE}
    written = json_for_script(data)
    assert "<" not in written
    assert json.loads(written) == data


def test_what_the_page_holds_of_many_steps_is_said(tmp_path, capsys):
    write_run(tmp_path / "run", num_steps=9, sampled_steps=tuple(range(1, 10)), num_tasks=1, num_documents=2)
    report([tmp_path / "run"], output=tmp_path / "report.html", rollout_steps=3)
    assert re.search(r"report\.html: \d+\.\d MB, 1 run\. Open it", capsys.readouterr().out)
    text = (tmp_path / "report.html").read_text()
    assert re.findall(r'id="rollouts-0-(\d+)"', text) == ["1", "5", "9"]
    assert "3 of 9 recorded steps are shown here, evenly spread over each run" in text
    with pytest.raises(ValueError, match="rollout_steps=1: give 2"):
        report([tmp_path / "run"], rollout_steps=1)


def test_a_run_with_nothing_but_a_log_says_what_is_missing(tmp_path):
    write_run(tmp_path / "run", num_documents=1)
    for folder in ("validation", "rollouts"):
        (tmp_path / "run" / folder).rename(tmp_path / folder)
    report([tmp_path / "run"], output=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    for missing in (
        "this run was never validated",
        "No run was validated",
        "needs validations at two or more steps",
        "No run recorded rollouts",
    ):
        assert missing in text


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    write_run(tmp_path / "a", num_steps=2, num_tasks=1, num_documents=1)
    write_run(tmp_path / "b", num_steps=2, num_tasks=1, num_documents=1)
    assert cli.main(["report", "a", "b", "--output", "out.html"]) == 0
    assert "2 runs" in capsys.readouterr().out
    assert (tmp_path / "out.html").is_file()
    assert cli.main(["report", "a", "nowhere"]) == 1
    assert (
        capsys.readouterr().err
        == "rpt: error: nowhere: no such run folder. Give the value of `trainer.default_root_dir`.\n"
    )
    with pytest.raises(SystemExit):
        cli.main(["report"])
    assert (
        capsys.readouterr().err
        == "rpt: error: the following arguments are required: runs\nWhat can be set: rpt report --help\n"
    )


@pytest.mark.long
def test_a_wheel_carries_the_page(tmp_path):
    # Build a copy, because a build leaves folders behind from which a later build would take its files.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "src" / "rpt_lightning",
        source / "src" / "rpt_lightning",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {
        name.rpartition("/")[2] for name in zipfile.ZipFile(wheel).namelist() if "evaluation/report/" in name
    }
    assert {"template.html", "style.css", "rollouts.js"} <= held
    assert {path.name for path in (source / "src/rpt_lightning/evaluation/report").iterdir()} == held
