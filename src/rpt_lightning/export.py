"""Makes a Hugging Face folder, or an adapter's folder, from one of our checkpoints.

transformers, vLLM and another run's ``--model.policy.path`` can load it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
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
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from rpt_lightning.compat.transformers import converts_weights
from rpt_lightning.pretrained.adapter_folder import write_adapter_folder
from rpt_lightning.pretrained.older_transformers import GENERIC_CLASS, older_tokenizer_config, with_older_rope
from rpt_lightning.pretrained.specification import has_hash, tokenizer_hash
from rpt_lightning.pretrained.tokenizer import CONFIG_FILE as TOKENIZER_CONFIG_FILE
from rpt_lightning.pretrained.tokenizer import FILE as TOKENIZER_FILE
from rpt_lightning.pretrained.tokenizer import as_in_folder, folder_file, is_repaired, read_tokenizer
from rpt_lightning.pretrained.weights import not_finite, some
from rpt_lightning.training.checkpoint.adapter import ENTRY, saved_adapter
from rpt_lightning.training.checkpoint.damage import checkpoint_damage
from rpt_lightning.training.checkpoint.merged import model_path_of, with_base
from rpt_lightning.training.checkpoint.reader import SavedPolicy, check_about, read_checkpoint

MAX_FILE_SIZE = "5GB"
# All files that a tokenizer is read from. A chat template may be in a file of its own.
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


def export(
    ckpt: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    form: Literal["merged", "adapter"] = "merged",
) -> None:
    """Write the policy of a checkpoint as a folder that transformers and vLLM can load.

    Args:
        ckpt: a ``.ckpt`` that ``rpt fit`` wrote: a file, or a folder if the strategy shards weights.
        output: the folder to make. It appears only once it is complete.
        dtype: dtype of the weights on disk. float32 is what was trained.
        form: "merged" writes a whole model, into which an adapter is merged. "adapter" writes the adapter
            alone, as peft and vLLM read it.

    Raises:
        ValueError: ``output`` exists; ``ckpt`` is not one of our checkpoints or is damaged; its weights do
            not fit its own config or are not finite; its tokenizer is missing or has changed; its adapter's
            base is missing or has changed; or it has no adapter to write.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"--output {output}: exists already. Name a new folder, or remove this one.")
    saved = read_checkpoint(Path(ckpt), flag="--ckpt")
    if damage := checkpoint_damage(Path(ckpt)):
        raise ValueError(
            f"--ckpt {ckpt} is not a whole checkpoint: {damage}; name another checkpoint of its folder"
        )
    check_about(saved.about, f"--ckpt {ckpt}")
    where = f"--ckpt {ckpt}"
    adapter = saved_adapter(saved.about, where)
    if form == "adapter":
        if adapter is None:
            raise ValueError(
                f"--form adapter: {ckpt} holds all weights of a model and no adapter; leave --form out"
            )
        _publish(folder, lambda unfinished: _save_adapter(saved, unfinished, ckpt, getattr(torch, dtype)))
        return
    if adapter is not None:
        saved = with_base(saved, where)
    model = _skeleton(saved, ckpt, getattr(torch, dtype))
    tokenizer = _load_tokenizer(saved.about, ckpt)
    generation_config = _generation_config(model, saved, ckpt)

    def write(unfinished: Path) -> None:
        if converts_weights(model):
            _save_converted(model, saved, unfinished, ckpt)
        else:
            _save_streamed(model, saved, unfinished, ckpt)
        _write_config(unfinished, model)
        if generation_config is not None:
            # `save_pretrained` would refuse files that contradict themselves, and some models have such files
            # (a temperature without `do_sample`).
            (unfinished / GENERATION_CONFIG_NAME).write_text(generation_config.to_json_string())
        _copy_tokenizer(tokenizer, unfinished)

    _publish(folder, write)


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder, which gets its name only once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(unfinished)
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _save_adapter(saved: SavedPolicy, folder: Path, ckpt: str, dtype: torch.dtype) -> None:
    adapter = saved_adapter(saved.about, f"--ckpt {ckpt}")
    assert adapter is not None
    settings, base, base_hash = adapter
    tensors = {name: tensor.to(dtype) for name, tensor in saved.read(list(saved.shapes)).items()}
    _check_finite(tensors, ckpt, dtype)
    write_adapter_folder(
        folder,
        tensors,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=tuple(sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in tensors})),
        rslora=settings.rslora,
        base=base,
        base_hash=base_hash,
    )


def _skeleton(saved: SavedPolicy, ckpt: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model without storage.

    Raises ValueError unless its weights in the checkpoint are complete and fit its shapes.
    """
    config = AutoConfig.for_model(**json.loads(saved.about["policy_config"]))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)  # type: ignore[no-untyped-call]
    model.tie_weights()
    # A tied head appears under one of its names. The other may or may not be in the checkpoint.
    own = dict(model.named_parameters())
    absent = [name for name in own if name not in saved.shapes]
    # An adapter's base may hold more, such as buffers of older versions.
    unexpected = [
        name for name in saved.shapes if ENTRY not in saved.about and name not in model.state_dict()
    ]
    if absent or unexpected:
        raise ValueError(
            f"--ckpt {ckpt}: not the whole policy: {len(absent)} tensors are missing {absent[:3]}, "
            f"{len(unexpected)} are unknown {unexpected[:3]}."
        )
    misshapen = [name for name, parameter in own.items() if saved.shapes[name] != parameter.shape]
    if misshapen:
        raise ValueError(
            f"--ckpt {ckpt}: its weights do not have the shapes of its own config: {', '.join(misshapen[:3])}"
        )
    return model


def _save_streamed(model: PreTrainedModel, saved: SavedPolicy, folder: Path, ckpt: str) -> None:
    """Write one file after the other, so that memory never holds more than one file's tensors."""
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
    """Write a family whose files hold other tensors or names than the model (separate experts, say).

    transformers converts them back. This takes the whole model in memory.
    """
    weights = {
        name: tensor.to(model.dtype)
        for name, tensor in saved.read([name for name, _ in model.named_parameters()]).items()
    }
    _check_finite(weights, ckpt, model.dtype)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=MAX_FILE_SIZE)


def _generation_config(model: PreTrainedModel, saved: SavedPolicy, ckpt: str) -> GenerationConfig | None:
    """The generation config of the model's folder: only this file has a chat model's several end tokens.

    For the many models without the file, the one made from the model's config is right.
    """
    path = model_path_of(saved.about, f"--ckpt {ckpt}")
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return model.generation_config
    except ValueError as error:
        raise ValueError(
            f"--ckpt {ckpt}: {GENERATION_CONFIG_NAME} of the model it was trained from, {path}, is invalid: "
            f"{error}. Fix that file."
        ) from error


def _check_finite(weights: dict[str, Tensor], ckpt: str, dtype: torch.dtype) -> None:
    if bad := not_finite(weights.items()):
        way_out = "export an earlier checkpoint"
        if dtype == torch.float16:  # its largest number is 65,504
            way_out = f"give --dtype float32 or bfloat16, or {way_out}"
        raise ValueError(
            f"--ckpt {ckpt}: as {str(dtype).removeprefix('torch.')}, {some(bad)} of its weights hold NaN or "
            f"infinity; {way_out}"
        )


def _write_config(folder: Path, model: PreTrainedModel) -> None:
    """Add what older readers need to the config.json that transformers wrote.

    The file is then read back: here it must still mean the same.
    """
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
            f"the exported {CONFIG_NAME} would be read with the rotary frequencies {theirs} instead of "
            f"{ours}: nothing was published"
        )


def _load_tokenizer(saved: dict[str, Any], ckpt: str) -> PreTrainedTokenizerBase:
    path = model_path_of(saved, f"--ckpt {ckpt}")
    try:
        tokenizer = as_in_folder(read_tokenizer(path), where=f"--ckpt {ckpt}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ckpt {ckpt}: its tokenizer comes from the model it was trained from, {path}, which cannot be "
            f"loaded ({error}). Put that folder back, or run from the directory in which training ran."
        ) from error
    if not has_hash(tokenizer, saved["tokenizer_hash"]):
        raise ValueError(
            f"--ckpt {ckpt}: the model it was trained from, {path}, now has another tokenizer than in "
            "training, so the exported policy would read and write other text. Restore that folder, or run "
            "from the directory in which training ran."
        )
    return tokenizer


def _copy_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Copy the tokenizer's files from the model's folder, byte for byte.

    The exception is words in tokenizer_config.json that only this version of transformers reads. A folder
    without a tokenizer.json (a sentencepiece model alone) gets the one that training used.
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
            f"the exported tokenizer would read text differently from that of {path}: nothing was published"
        )
    # For some model types transformers 5 chooses the class itself, whatever the folder says.
    if tokenizer_hash(exported) != tokenizer_hash(tokenizer):
        print(
            f"note: AutoTokenizer of transformers {transformers.__version__} builds a "
            f"{type(exported).__name__} for this model type, which reads text differently from "
            f"{TOKENIZER_FILE}; with it, load the folder's tokenizer by {GENERIC_CLASS}.from_pretrained",
            flush=True,
        )
