"""A Hugging Face folder from one of our checkpoints, for transformers, vLLM or another run's ``--model.policy.path``."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

_WEIGHTS_PREFIX = "policy.model."


def export(ckpt: str, output: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Write the policy of a checkpoint as a folder that transformers and vLLM load.

    Args:
        ckpt: a ``.ckpt`` file that ``rpt fit`` wrote.
        output: the folder to make; it appears only when it is complete.
        dtype: of the weights on disk. float32 is what was trained.

    Raises:
        ValueError: ``output`` exists, ``ckpt`` is not one of our checkpoints, or its weights do not fit its own config.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"--output {output}: exists already. Name a new folder, or remove this one.")
    checkpoint = _load(Path(ckpt))
    model = _build_model(checkpoint, ckpt).to(getattr(torch, dtype))
    tokenizer = _load_tokenizer(checkpoint["rpt"]["policy_path"], ckpt)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)
    try:
        model.save_pretrained(unfinished, max_shard_size="5GB")
        tokenizer.save_pretrained(unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _load(path: Path) -> dict[str, Any]:
    flag = f"--ckpt {path}"
    if path.is_dir():
        raise ValueError(
            f"{flag}: a folder, as a sharded strategy writes it. Join it into one file first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path} --output_file whole.ckpt"
        )
    if not path.is_file():
        raise ValueError(f"{flag}: no such file. `rpt fit` writes checkpoints into the run's folder.")
    try:
        # mmap: a checkpoint holds the optimizer too, three times the weights, which is never read here.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{flag}: not a checkpoint that can be read ({type(error).__name__}). Was it cut off while it was written?") from error
    if not isinstance(checkpoint, dict) or "rpt" not in checkpoint or "state_dict" not in checkpoint:
        raise ValueError(f"{flag}: not a checkpoint of `rpt fit` (it has no entry 'rpt' that says which policy it holds).")
    return checkpoint


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


def _load_tokenizer(policy_path: str, ckpt: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(policy_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ckpt {ckpt}: its tokenizer comes from the model it was trained from, {policy_path}, which cannot be loaded ({error}). "
            "Put that folder back, or run from the directory in which training ran."
        ) from error
