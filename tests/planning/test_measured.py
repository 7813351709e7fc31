"""Compare the plan with a real training process: its peak memory and its tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rpt_lightning.planning.memory import AUTOCAST, FP32, training_memory
from rpt_lightning.planning.model_shape import load_model_config, model_shape
from rpt_lightning.planning.workload import assumed_prompts, step_tokens

STEP = {
    "tasks": 2,
    "prompt_tokens": 300,
    "completion_tokens": 100,
    "group_size": 8,
    "micro_batch_tokens": 1100,
}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory):
    """Make 42M random parameters, so that the measurement is of the model and not of the interpreter."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("models") / "42M")
    (folder / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "checkpointing"), [("32-true", False), ("32-true", True), ("bf16-mixed", True)]
)
def test_a_real_step_takes_what_is_planned(precision, checkpointing, model_dir, tmp_path):
    options = STEP | {"precision": precision, "checkpointing": checkpointing}
    command = [
        sys.executable,
        str(Path(__file__).with_name("measured_run.py")),
        str(model_dir),
        str(tmp_path),
        json.dumps(options),
    ]
    # Large tensors are given back when they are freed. Memory that the C library's heap would keep of them is
    # no part of the plan, and differs from CPU to CPU.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    measured = json.loads(run.stdout.splitlines()[-1])

    prompts = assumed_prompts(num_tasks=2, positions_per_document=1, context_tokens=300, template_tokens=0)
    tokens = step_tokens(
        prompts, group_size=8, completion_tokens=100, live_frac=1.0, micro_batch_tokens=1100, num_ranks=1
    )
    assert (measured["packed_tokens"], measured["plain_tokens"]) == (
        tokens.packed.tokens,
        tokens.plain.tokens,
    )
    assert measured["micro_batches"] == tokens.micro_batches

    planned = training_memory(
        model_shape(load_model_config(str(model_dir))), strategy="single", num_ranks=1,
        micro_batch_tokens=1100,
        masked_pairs=tokens.masked_pairs, precision=AUTOCAST if precision == "bf16-mixed" else FP32,
        checkpointing=checkpointing,
        optimizer_bytes_per_param=8, logprob_chunk_size=512, on_gpu=False,
    ).total_bytes  # fmt: skip
    print(
        f"{precision}, checkpointing {checkpointing}: planned {planned / 1e6:,.0f} MB, "
        f"measured {measured['peak_bytes'] / 1e6:,.0f} MB"
    )
    assert planned == pytest.approx(measured["peak_bytes"], rel=0.25)
