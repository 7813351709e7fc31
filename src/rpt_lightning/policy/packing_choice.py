"""Choose the packing that a model family can take, by measurement rather than by a list of names.

The log-probs of packed sequences are compared with those of the model's own separate calls. The comparison
uses a small copy of the model with one layer of each kind, few units between layers, a small vocabulary, and
random values in every parameter. The result is therefore the same whether a process will hold all of the
weights or only a shard of them, and no weights have to be read for it.

The copy computes in training mode, as the policy does, and twice. The engine computes as in evaluation mode,
so noise, dropped layers and state left by an earlier call would make the two disagree. The packed sequences
are computed on the device that trains, because each kind of device has its own attention kernel.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rpt_lightning.compat.transformers import attention_name, rope_depends_on_call
from rpt_lightning.policy.attention.tree_attention import NAME
from rpt_lightning.policy.exact_products import exact_products
from rpt_lightning.policy.packing.rows import pack_rows
from rpt_lightning.policy.packing.trees import PackedTree, pack
from rpt_lightning.policy.tree_scores import score
from rpt_lightning.types import TrainSequence

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
SEQUENCES = (
    TrainSequence(prompt_ids=(3, 4), target_ids=(5, 6, 7)),
    TrainSequence(prompt_ids=(3, 4), target_ids=(8, 9, 7)),
)
CPU = torch.device("cpu")
TOLERANCE = 1e-3  # nats; a wrong mask or a scaled head is off by far more
MODE_TOLERANCE = 1e-5  # nats; on a CPU, training and evaluation mode normally give the same bits
LOADED_TOLERANCE = 1e-2  # nats; activations of trained models reach thousands, so fp32 rounding is larger
WINDOW = 2  # tokens; the sequences here are shorter than a window from a real configuration


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The chosen packing.

    ``attention`` names the attention function that the model's layers call. ``reason`` says why the model
    cannot share prefixes, and is None if it can.
    """

    attention: str
    reason: str | None

    @property
    def shares_prefixes(self) -> bool:
        return self.reason is None


def choose_packing(
    config: PreTrainedConfig,
    *,
    path: str,
    trust_remote_code: bool = False,
    device: torch.device = CPU,
) -> Packing:
    """Choose trees if the family's layers and the kernel of the training device can take them.

    The choice is rows otherwise. The log-probs that both are compared with are computed on the CPU.

    Raises:
        ValueError: Neither packing would be right. Either our log-probs differ from the model's own (always
            or in training mode), or they depend on what else is in the batch. ``path`` names the model in the
            message.
    """
    _check_rotary_frequencies(config, path)
    # Lightning builds models with the accelerator as the default device. The trainer's random generator must
    # not be affected by the values that this model draws.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), exact_products():
        model = small_copy(config, trust_remote_code=trust_remote_code)
        expected = own_logprobs(model)
        model.train()
        _check_training_mode(model, expected, path)
        cast(Any, model).to(device)  # its annotation in transformers takes no device
        reason = _why_no_trees(model, expected)
        if reason is None:
            return Packing(attention=NAME, reason=None)
        # sdpa ignores the features that tree attention refuses (capped scores, sinks). Models with linear
        # attention have few layers that would gain from sdpa.
        model.set_attn_implementation("eager")
        difference = _largest_difference(model, pack_rows, expected)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"policy.path={path}: the log-probs of {type(model).__name__} differ from those of its hidden "
            f"states and output head (difference {difference:.2g} nats; {reason}). Perhaps it scales its "
            "logits after the head. Use a model of the Llama, Qwen2 or Qwen3 family"
        )
    return Packing(attention="eager", reason=reason)


def check_loaded(model: PreTrainedModel, packing: Packing, *, path: str) -> None:
    """Compare the log-probs that training will compute with the model's own logits, on the loaded weights.

    Raises:
        ValueError: They differ. ``path`` names the model in the message.
    """
    was_training, was_attention = model.training, attention_name(model)
    with torch.random.fork_rng(devices=[]):
        model.train(False).set_attn_implementation("eager")
        expected = own_logprobs(model).cpu()
        model.train().set_attn_implementation(packing.attention)
        difference = _largest_difference(model, pack if packing.shares_prefixes else pack_rows, expected)
    model.train(was_training).set_attn_implementation(was_attention)
    if not difference <= LOADED_TOLERANCE:
        raise ValueError(
            f"policy.path={path}: with the folder's weights, the log-probs of {type(model).__name__} differ "
            f"from those of its own logits (difference {difference:.2g} nats; rounding explains at most "
            f"{LOADED_TOLERANCE:g}); use a model of the Llama, Qwen2 or Qwen3 family"
        )


def small_copy(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build a small model of the same family on the CPU.

    Its random weights are so large that every token within a mask changes the log-probs.
    """
    small = copy.deepcopy(config)
    text: Any = small.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    chosen = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    chosen += [layer for layer in range(len(kinds)) if layer not in chosen][: max(0, 2 - len(chosen))]
    text.num_hidden_layers = len(chosen)
    if getattr(text, "layer_types", None):
        text.layer_types = [kinds[layer] for layer in sorted(chosen)]
    text.vocab_size, text.pad_token_id = 16, None
    if isinstance(getattr(text, "intermediate_size", None), int):
        text.intermediate_size = min(text.intermediate_size, 64)
    if isinstance(getattr(text, "sliding_window", None), int):
        text.sliding_window = WINDOW
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cast(Any, AutoModelForCausalLM).from_config(
            small, dtype=torch.float32, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=1.5 / math.sqrt(parameter[0].numel()))
                else:  # biases stay near 0, norms near 1, and the rates of a state near their initial values
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return cast(PreTrainedModel, model.eval())


def _check_training_mode(model: PreTrainedModel, expected: Tensor, path: str) -> None:
    """Raise ValueError if training mode changes the log-probs. Engines compute in evaluation mode."""
    difference = max((own_logprobs(model) - expected).abs().max().item() for _ in range(2))
    if not difference <= MODE_TOLERANCE:
        noise = {
            name: value
            for name, value in vars(model.config.get_text_config()).items()
            if name.endswith(("drop", "dropout", "noise", "epsilon"))
            and isinstance(value, float)
            and value > 0
        }
        raise ValueError(
            f"policy.path={path}: {type(model).__name__} gives different log-probs in training mode than in "
            f"evaluation mode, which engines use (difference {difference:.2g} nats)"
            f"{f'; {noise} in its config.json may be the cause: set what adds noise to 0' if noise else ''}; "
            "or use a model of the Llama, Qwen2 or Qwen3 family"
        )


def _check_rotary_frequencies(config: PreTrainedConfig, path: str) -> None:
    """Raise ValueError for rotary frequencies that depend on the other sequences of a call.

    For some types, transformers recomputes the frequencies in each call from its longest position
    (`dynamic_rope_update`). A sequence would get different log-probs beside a long sequence than beside a
    short one. The sequences compared in this file are too short to show this effect.
    """
    rope: dict[str, Any] = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # One dict, or one for each type of layer.
    of_layers = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    types = {str(part["rope_type"]) for part in of_layers if part.get("rope_type")}
    by_call = sorted(kind for kind in types if rope_depends_on_call(kind))
    if by_call:
        raise ValueError(
            f"policy.path={path}: its rope_type {', '.join(by_call)} sets the rotary frequencies by the "
            "longest sequence of a call, so log-probs would depend on what else is in a micro-batch; use a "
            "model whose rope_type is default, linear, llama3 or yarn (rope_parameters in its config.json)"
        )


def _why_no_trees(model: PreTrainedModel, expected: Tensor) -> str | None:
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ATTENTION_LAYERS)
    if not kinds <= ATTENTION_LAYERS:
        return f"it has layers with {', '.join(sorted(kinds - ATTENTION_LAYERS))}"
    try:
        model.set_attn_implementation(NAME)
        difference = _largest_difference(model, pack, expected)
    except (ValueError, TypeError) as error:
        return str(error)
    return (
        None if difference <= TOLERANCE else f"packed as a tree its log-probs differ by {difference:.2g} nats"
    )


@torch.no_grad()
def own_logprobs(model: PreTrainedModel) -> Tensor:
    """Compute the log-probs of each sequence's targets from the model's own logits, [2, 3].

    Each call takes one sequence.
    """
    rows = []
    for sequence in SEQUENCES:
        ids = torch.tensor([sequence.prompt_ids + sequence.target_ids], device=model.device)
        logprobs = model(input_ids=ids, use_cache=False).logits[0, 1:-1].float().log_softmax(-1)
        rows.append(logprobs.gather(-1, ids[0, 2:, None])[:, 0])
    return torch.stack(rows)


@torch.no_grad()
def _largest_difference(
    model: PreTrainedModel, packed: Callable[..., Iterator[PackedTree]], expected: Tensor
) -> float:
    """Return the largest difference over two calls, in nats.

    The second call may see state that the first left behind.
    """
    with torch.device("cpu"):
        (tree,) = packed(SEQUENCES, max_tokens=16)
    tree = tree.to(model.device)
    wanted = expected[list(tree.sequence_indices)]
    return max((tree.unpack(score(model, tree)[0]).cpu() - wanted).abs().max().item() for _ in range(2))
