"""A Hugging Face folder from one of our checkpoints, for transformers, vLLM or another run's ``--model.policy.path``."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from rpt_lightning.pretrained.older_readers import GENERIC_CLASS, older_tokenizer_config, with_older_rope
from rpt_lightning.pretrained.specification import has_hash, tokenizer_hash
from rpt_lightning.pretrained.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from rpt_lightning.pretrained.tokenizer import FILE as TOKENIZER_FILE
from rpt_lightning.pretrained.tokenizer import as_in_folder, folder_file, is_repaired, read_tokenizer
from rpt_lightning.pretrained.weights import not_finite, some
from rpt_lightning.training.checkpoint_check import checkpoint_damage
from rpt_lightning.training.checkpoint_file import SavedPolicy, check_about, read_checkpoint

MAX_FILE_SIZE = "5GB"
# All that a tokenizer is read from. A chat template may lie in a file of its own.
TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    ),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "tokenizer.model.v3", "tekken.json"),
)


def export(ckpt: str, output: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> None:
    """Write the policy of a checkpoint as a folder that transformers and vLLM load.

    Args:
        ckpt: a ``.ckpt`` that ``rpt fit`` wrote: a file, or a folder where the strategy shards weights.
        output: the folder to make; it appears only when it is complete.
        dtype: of the weights on disk. float32 is what was trained.

    Raises:
        ValueError: ``output`` exists, ``ckpt`` is not one of our checkpoints, it is damaged, its weights do not fit its own config or are not
            finite, or its tokenizer is gone or another.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"--output {output}: exists already. Name a new folder, or remove this one.")
    saved = read_checkpoint(Path(ckpt), flag="--ckpt")
    if damage := checkpoint_damage(Path(ckpt)):
        raise ValueError(f"--ckpt {ckpt} is not a whole checkpoint: {damage}; name another of its folder")
    check_about(saved.about, f"--ckpt {ckpt}")
    model = _skeleton(saved, ckpt, getattr(torch, dtype))
    tokenizer = _load_tokenizer(saved.about, ckpt)
    generation_config = _generation_config(model, saved, ckpt)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        if get_model_conversion_mapping(model, add_legacy=False):  # by model type or class
            _save_converted(model, saved, unfinished, ckpt)
        else:
            _save_streamed(model, saved, unfinished, ckpt)
        _write_config(unfinished, model)
        if generation_config is not None:
            # Not its `save_pretrained`, which refuses files that contradict themselves, as those of some models do (a temperature without `do_sample`).
            (unfinished / GENERATION_CONFIG_NAME).write_text(generation_config.to_json_string())
        _copy_tokenizer(tokenizer, unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _skeleton(saved: SavedPolicy, ckpt: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model without storage, after its weights in the checkpoint were found to be complete and of its shapes."""
    config = AutoConfig.for_model(**json.loads(saved.about["policy_config"]))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    own = dict(
        model.named_parameters()
    )  # a tied head under one of its names, the other may or may not be in the checkpoint
    absent = [name for name in own if name not in saved.shapes]
    unexpected = [name for name in saved.shapes if name not in model.state_dict()]
    if absent or unexpected:
        raise ValueError(
            f"--ckpt {ckpt}: not the whole policy: {len(absent)} tensors are missing {absent[:3]}, {len(unexpected)} are unknown {unexpected[:3]}."
        )
    misshapen = [name for name, parameter in own.items() if saved.shapes[name] != parameter.shape]
    if misshapen:
        raise ValueError(
            f"--ckpt {ckpt}: its weights do not have the shapes of its own config: {', '.join(misshapen[:3])}"
        )
    return model


def _save_streamed(model: PreTrainedModel, saved: SavedPolicy, folder: Path, ckpt: str) -> None:
    """One file after the other, so that never more than one file's tensors are in memory."""
    skeleton: dict[str, Tensor] = dict(model.named_parameters())
    split = split_torch_state_dict_into_shards(skeleton, max_shard_size=MAX_FILE_SIZE)
    for file, names in split.filename_to_tensors.items():
        tensors = {
            name: tensor.to(skeleton[name].dtype).contiguous() for name, tensor in saved.read(names).items()
        }
        _check_finite(tensors, ckpt, model.dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)


def _save_converted(model: PreTrainedModel, saved: SavedPolicy, folder: Path, ckpt: str) -> None:
    """Families whose files hold other tensors or names than the model (experts apart, say): transformers converts them back, of the whole model in memory."""
    weights = {
        name: tensor.to(model.dtype)
        for name, tensor in saved.read([name for name, _ in model.named_parameters()]).items()
    }
    _check_finite(weights, ckpt, model.dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=MAX_FILE_SIZE)


def _generation_config(model: PreTrainedModel, saved: SavedPolicy, ckpt: str) -> GenerationConfig | None:
    """That of the model's folder: a chat model's several end tokens stand only there. The one made from its config is right for the many models without."""
    path = saved.about["policy_path"]
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return model.generation_config
    except ValueError as error:
        raise ValueError(
            f"--ckpt {ckpt}: {GENERATION_CONFIG_NAME} of the model it was trained from, {path}, cannot be: {error}. Mend that file."
        ) from error


def _check_finite(weights: dict[str, Tensor], ckpt: str, dtype: torch.dtype) -> None:
    if bad := not_finite(weights.items()):
        way_out = "export an earlier checkpoint"
        if dtype == torch.float16:  # which ends at 65,504
            way_out = f"give --dtype float32 or bfloat16, or {way_out}"
        raise ValueError(
            f"--ckpt {ckpt}: as {str(dtype).removeprefix('torch.')}, {some(bad)} of its weights hold NaN or infinity; {way_out}"
        )


def _write_config(folder: Path, model: PreTrainedModel) -> None:
    """Adds what older readers need to the config.json that transformers wrote, and reads it back: it must still say the same here."""
    path = folder / CONFIG_NAME
    path.write_text(
        json.dumps(with_older_rope(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n"
    )
    ours, theirs = (
        getattr(config.get_text_config(), "rope_parameters", None)
        for config in (model.config, AutoConfig.from_pretrained(folder))
    )
    if ours != theirs:
        raise RuntimeError(
            f"the exported {CONFIG_NAME} would be read with the rotary frequencies {theirs} instead of {ours}: nothing was published"
        )


def _load_tokenizer(saved: dict[str, Any], ckpt: str) -> PreTrainedTokenizerBase:
    path = saved["policy_path"]
    try:
        tokenizer = as_in_folder(read_tokenizer(path), where=f"--ckpt {ckpt}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ckpt {ckpt}: its tokenizer comes from the model it was trained from, {path}, which cannot be loaded ({error}). "
            "Put that folder back, or run from the directory in which training ran."
        ) from error
    if not has_hash(tokenizer, saved["tokenizer_hash"]):
        raise ValueError(
            f"--ckpt {ckpt}: the model it was trained from, {path}, has another tokenizer now than in training, so the exported policy would read "
            "and write other text. Put back what lay there, or run from the directory in which training ran."
        )
    return tokenizer


def _copy_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The files of the model's folder, byte for byte, but for words in tokenizer_config.json that only this version of transformers reads.

    A folder without a tokenizer.json (a sentencepiece model alone) gets the one that training had.
    """
    path = tokenizer.name_or_path
    found = {name: file for name in TOKENIZER_FILES if (file := folder_file(path, name)) is not None}
    if TOKENIZER_FILE not in found:
        tokenizer.save_pretrained(folder)
    for name, file in found.items():
        shutil.copyfile(file, folder / name)
    config_path = folder / TOKENIZER_CONFIG_FILE
    config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
    older = older_tokenizer_config(config, is_repaired=TOKENIZER_FILE in found and is_repaired(tokenizer))
    if older != config:
        config_path.write_text(json.dumps(older, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    exported = read_tokenizer(str(folder))
    if tokenizer_hash(as_in_folder(exported, where=str(folder))) != tokenizer_hash(tokenizer):
        raise RuntimeError(
            f"the exported tokenizer would read text otherwise than that of {path}: nothing was published"
        )
    if tokenizer_hash(exported) != tokenizer_hash(
        tokenizer
    ):  # transformers 5 takes the class of some model types, whatever the folder says
        print(
            f"note: AutoTokenizer of transformers {transformers.__version__} builds a {type(exported).__name__} of this model type, which reads text otherwise "
            f"than {TOKENIZER_FILE}; with it, load the folder's tokenizer by {GENERIC_CLASS}.from_pretrained",
            flush=True,
        )
