"""One clear error for each bad input, before anything is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


BAD = {
    "unknown key": (["--model.polcy.path", "x"], "polcy"),
    "wrong type": (["--trainer.max_steps", "many"], "max_steps"),
    "missing model": (["--model.policy.path", "no/such/folder"], "no/such/folder"),
    "missing task folder": (["--data.task_dir", "no/such/tasks"], "no/such/tasks"),
    "group of one": (["--rollout.group_size", "1"], "group_size=1"),
    "greedy training": (["--rollout.sampling.temperature", "0"], "temperature=0"),
    "prompt limit": (["--rollout.max_prompt_tokens", "4"], "max_prompt_tokens"),
    "no checkpoint": (["--ckpt_path", "last"], "there is no checkpoint"),
    "missing checkpoint": (["--ckpt_path", "no/such.ckpt"], "no/such.ckpt: no such file"),
    "unknown prompt version": (
        ["--rollout.objective.prompt", "ChatPrompt", "--rollout.objective.prompt.version", "v9"],
        "v9",
    ),
    "truncating sampler with correction": (
        ["--rollout.sampling.top_p", "0.9", "--model.correction", "truncate"],
        "top_p=0.9",
    ),
    "too many tasks": (["--data.tasks_per_step", "1000000"], "tasks_per_step"),
    "no engine": (["--rollout.engine", "null"], "rollout.engine"),
    "unknown accelerator": (["--trainer.accelerator", "abacus"], "abacus"),
    "unknown precision": (["--trainer.precision", "7"], "precision"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case, flags, rpt, tmp_path):
    args, expected = BAD[case]
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "run", *args)
    assert status != 0
    assert expected in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_a_tokenizer_without_chat_template(flags, tiny_model_dir, rpt, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    chat = ["--rollout.objective.prompt", "ChatPrompt", "--model.policy.path", tmp_path / "model"]
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "run", *chat)
    assert status == 1
    assert "has no chat template, which ChatPrompt needs" in output


@pytest.mark.parametrize(
    ("config", "model", "data", "other"),
    [
        ("debug.yaml", "NTPModule", "TokenTaskDataModule", "TextDataModule"),
        ("ntp-baseline.yaml", "RPTModule", "TextDataModule", "TokenTaskDataModule"),
    ],
)
def test_model_and_data_that_do_not_fit(
    config, model, data, other, tiny_model_dir, tiny_task_dir, rpt, tmp_path
):
    args = [
        "--model",
        model,
        "--model.policy.path",
        tiny_model_dir,
        "--data.task_dir",
        tiny_task_dir,
        "--trainer.default_root_dir",
        tmp_path / "run",
    ]
    status, output = rpt("fit", "--config", CONFIGS / config, *args)
    assert status == 1
    assert f"model={model} and data={data} do not fit together" in output
    assert f"--data {other}" in output
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_used(finished_run, flags, rpt, tmp_path):
    good = (finished_run[0] / "checkpoints" / "step-000004.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    for name, expected in (
        ("cut", "can be read"),
        ("text", "can be read"),
        ("foreign", "not a checkpoint of `rpt fit`"),
    ):
        for verb in ("fit", "validate"):
            status, output = rpt(
                verb,
                *flags,
                "--trainer.default_root_dir",
                tmp_path / "run",
                "--ckpt_path",
                tmp_path / f"{name}.ckpt",
            )
            assert status == 1
            assert expected in output
            assert f"{name}.ckpt" in output


def test_shards_need_a_strategy_with_shards(finished_run, flags, rpt, tmp_path):
    checkpoint = torch.load(finished_run[0] / "checkpoints" / "step-000004.ckpt", weights_only=True)
    folder = tmp_path / "step-000004.ckpt"
    torch.distributed.checkpoint.save(
        {"state_dict": checkpoint.pop("state_dict")}, checkpoint_id=folder, no_dist=True
    )
    torch.save({"rpt": checkpoint["rpt"]}, folder / "meta.pt")
    status, output = rpt("fit", *flags, "--trainer.default_root_dir", tmp_path / "run", "--ckpt_path", folder)
    assert status == 1
    assert (
        "it is stored in shards, which a strategy without shards cannot read; "
        "add --config configs/strategy/fsdp2.yaml" in output
    )


def test_checkpoint_of_another_model(finished_run, flags, tiny_model_dir, rpt, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(other)).save_pretrained(other)
    checkpoint = finished_run[0] / "checkpoints" / "step-000004.ckpt"
    status, output = rpt(
        "fit",
        *flags,
        "--trainer.default_root_dir",
        tmp_path / "run",
        "--model.policy.path",
        other,
        "--ckpt_path",
        checkpoint,
    )
    assert status == 1
    assert "weight shapes differ" in output


BAD_PREPARE = {
    "unknown flag": (["--tokeniser", "x"], "tokeniser"),
    "missing tokenizer": (["--tokenizer", "no/such/model"], "--tokenizer 'no/such/model'"),
    "nothing held out": (["--heldout_documents", "0"], "--heldout_documents 0: must be at least 1"),
    "context longer than documents": (
        ["--min_context", "200"],
        "--max_tokens_per_document 128: leaves nothing",
    ),
    "unknown source": (["--source.class_path", "NoSource"], "NoSource"),
}


@pytest.mark.parametrize("case", BAD_PREPARE)
def test_bad_flags_of_prepare(case, rpt, tmp_path):
    args, expected = BAD_PREPARE[case]
    status, output = rpt(
        "prepare", "--config", CONFIGS / "prepare" / "debug.yaml", "--output_dir", tmp_path / "tasks", *args
    )
    assert status != 0
    assert expected in output
    assert "Traceback" not in output
    assert not (tmp_path / "tasks").exists()
