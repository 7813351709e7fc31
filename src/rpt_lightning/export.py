"""A Hugging Face folder from one of our checkpoints, for transformers, vLLM or another run's ``--model.policy.path``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from rpt_lightning.tasks.token_bytes import tokenizer_hash
from rpt_lightning.training.checkpoint_file import read_checkpoint

_WEIGHTS_PREFIX = "policy.model."


def export(ckpt: str, output: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Write the policy of a checkpoint as a folder that transformers and vLLM load.

    Args:
        ckpt: a ``.ckpt`` that ``rpt fit`` wrote: a file, or a folder where the strategy shards weights.
        output: the folder to make; it appears only when it is complete.
        dtype: of the weights on disk. float32 is what was trained.

    Raises:
        ValueError: ``output`` exists, ``ckpt`` is not one of our checkpoints, its weights do not fit its own config, or its tokenizer is gone or another.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"--output {output}: exists already. Name a new folder, or remove this one.")
    checkpoint = read_checkpoint(Path(ckpt), flag="--ckpt")
    model = _build_model(checkpoint, ckpt).to(getattr(torch, dtype))
    tokenizer = _load_tokenizer(checkpoint["rpt"], ckpt)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    try:
        model.save_pretrained(unfinished, max_shard_size="5GB")
        tokenizer.save_pretrained(unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _build_model(checkpoint: dict[str, Any], ckpt: str) -> PreTrainedModel:
    config = AutoConfig.for_model(**json.loads(checkpoint["rpt"]["policy_config"]))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    weights = {name.removeprefix(_WEIGHTS_PREFIX): tensor for name, tensor in checkpoint["state_dict"].items() if name.startswith(_WEIGHTS_PREFIX)}
    try:
        # assign: the model has no storage yet, so the checkpoint's tensors become its parameters.
        unexpected = model.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise ValueError(f"--ckpt {ckpt}: its weights do not have the shapes of its own config. {error}") from error
    # A tied head need not be in the checkpoint; it is tied again here.
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or unexpected:
        raise ValueError(
            f"--ckpt {ckpt}: not the whole policy: {len(absent)} tensors are missing {absent[:3]}, {len(unexpected)} are unknown {unexpected[:3]}."
        )
    # A chat model's several end tokens stand only here. Many models have no such file; the one made from the config is right for them.
    with suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(checkpoint["rpt"]["policy_path"])
    return model


def _load_tokenizer(saved: dict[str, Any], ckpt: str) -> Any:
    path = saved["policy_path"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ckpt {ckpt}: its tokenizer comes from the model it was trained from, {path}, which cannot be loaded ({error}). "
            "Put that folder back, or run from the directory in which training ran."
        ) from error
    if tokenizer_hash(tokenizer) != saved["tokenizer_hash"]:
        raise ValueError(
            f"--ckpt {ckpt}: the model it was trained from, {path}, has another tokenizer now than in training, so the exported policy would read "
            "and write other text. Put back what lay there, or run from the directory in which training ran."
        )
    return tokenizer
