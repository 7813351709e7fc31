"""The paper's tables that need more than one command.

Each is made on small data by the commands that docs/paper.md names.
"""

from __future__ import annotations

import shutil
import sys

import pytest
from transformers import AutoTokenizer

from rpt_lightning import cli

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def chat_model_dir(tiny_model_dir, tmp_path):
    """Make the tiny model with a chat template. Its vocabulary, and so its task folders, are the same."""
    folder = tmp_path / "chat"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_prompt_versions_before_training(chat_model_dir, tiny_task_dir, tmp_path, monkeypatch, capsys):
    """In table 10, random@1 is the mean of single samples (avg@n).

    pass@8 is the unbiased estimate from the same samples.
    """
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    small = [
        "--num_tasks",
        "6",
        "--max_completion_tokens",
        "8",
        "--max_context_tokens",
        "40",
        "--accelerator",
        "cpu",
        "--thought_controls",
        "false",
    ]
    common = [
        "evaluate",
        "next-token",
        "--policy",
        chat_model_dir,
        "--task_dir",
        tiny_task_dir,
        "--engine",
        "HFEngine",
        "--engine.dtype",
        "float32",
    ]
    for version in ("v0", "v3"):
        asked = [
            "--prompt",
            "ChatPrompt",
            "--prompt.version",
            version,
            "--k",
            "8",
            "--output",
            tmp_path / "prompts" / version,
        ]
        assert cli.main([str(arg) for arg in [*common, *asked, *small]]) == 0
    output = tmp_path / "prompts.md"
    runs = [str(tmp_path / "prompts" / version / "chat") for version in ("v0", "v3")]
    assert cli.main(["compare", *runs, "--output", str(output)]) == 0
    text = output.read_text()
    assert "| sampled answers, intervals over documents | v0/chat | v3/chat |" in text
    assert "| temperature; samples per position | 0.8; 8 | 0.8; 8 |" in text
    for row in ("avg@n", "pass@8", "NTP accuracy, same positions"):
        assert f"| {row} | " in text
    assert text in capsys.readouterr().out
