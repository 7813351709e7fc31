"""From a base model without a cold start: thoughts in brackets, rewarded by information gain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.records.results import read_results

OVERLAY = Path(__file__).resolve().parents[2] / "configs" / "rollout" / "base-model.yaml"


@pytest.fixture(scope="module")
def base_model_dir(tiny_model_dir, tiny_task_dir, tmp_path_factory):
    """The tiny model, trained on the next tokens of text with remarks in brackets, and on nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    encode, folder = TokenBytes(tokenizer).encode_plain, TaskFolder(tiny_task_dir, "train")
    remarks = [encode(f" ({remark})") for remark in ("so", "it is", "or", "as is")]
    texts = [folder.token_ids(index) for index in range(len(folder))]
    rows = torch.zeros(24, 40, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        for row in range(len(rows)):
            number, place, remark = torch.randint(0, 10_000, (3,), generator=generator).tolist()
            text = texts[number % len(texts)]
            cut = 1 + place % min(30, len(text) - 1)
            ids = (*text[:cut], *remarks[remark % len(remarks)], *text[cut:], *text)
            rows[row] = torch.tensor(ids[: rows.shape[1]])
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lines_of(run):
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def test_a_base_model_thinks_in_brackets_and_learns(rpt, flags, tmp_path, base_model_dir):
    own = [*flags, "--model.policy.path", base_model_dir]
    # In the usual form it never answers, so nothing can be learned.
    status, shown = rpt(
        "fit", *own, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0",
        "--trainer.default_root_dir", tmp_path / "boxed",
    )  # fmt: skip
    assert status == 0, shown
    (line,) = lines_of(tmp_path / "boxed")
    assert (line["rollout/boxed_frac"], line["rollout/live_groups"], line["optim/grad_norm"]) == (0, 0, 0)

    run = tmp_path / "brackets"
    status, shown = rpt(
        "fit", *own, "--config", OVERLAY, "--trainer.max_steps", "2", "--trainer.default_root_dir", run
    )
    assert status == 0, shown
    for line in lines_of(run):
        assert line["rollout/boxed_frac"] > 0.5
        assert line["rollout/live_groups_frac"] > 0.5
        assert line["optim/grad_norm"] > 0
    results = read_results(run / "validation" / "step-000002.jsonl").positions
    assert sum(bool(row.boxed) for row in results) > len(results) / 2
    # A prediction is the one token after the bracket.
    tokens = TokenBytes(AutoTokenizer.from_pretrained(base_model_dir))
    whole = [row.prediction for row in results if row.prediction and "\ufffd" not in row.prediction]
    assert whole
    assert all(len(tokens.encode_plain(prediction)) == 1 for prediction in whole)
