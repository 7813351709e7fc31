"""Make a folder with a random model of SmolLM2-135M's size, for policies and engines that start from one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from models import SMOLLM2_135M
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_model


def make_model_folder(folder: Path, *, short: bool) -> Path:
    """Make weights, configuration and tokenizer.

    The tokenizer is the byte-level one of scripts/make_model.py's tiny model, because the policy's output
    does not matter. ``short`` makes that tiny model itself.
    """
    make_model.make("tiny", folder)
    if not short:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M))
        ids = LlamaConfig.from_pretrained(folder)
        model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = (
            ids.bos_token_id,
            ids.eos_token_id,
            ids.pad_token_id,
        )
        model.save_pretrained(folder)
    return folder
