"""The policy: a transformers causal language model whose backbone, head and log-probs run inside one ``forward``.

That one ``forward`` makes it the sharding root: calling the backbone and then the head's weight from outside fails under FSDP2 (mixed tensors and
DTensors).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rpt_lightning.policy.logprobs import chosen_logprobs, most_likely
from rpt_lightning.policy.packing import PackedTree


class Policy(nn.Module):
    """Args:
    path: Hugging Face folder (or hub id) of the model and its tokenizer.
    logprob_chunk_size: Tokens whose logits exist at the same time.
    head_dtype: "compute" multiplies the head in the precision of the rest (bf16 under autocast), "float32" in fp32, which narrows the gap to an fp32 engine.
    activation_checkpointing: Recompute each layer in the backward pass instead of keeping its activations.
    trust_remote_code: Let the model folder run its own Python code. Off unless you ask for it.
    """

    model: PreTrainedModel  # from `materialize` on

    def __init__(
        self,
        path: str,
        logprob_chunk_size: int = 512,
        head_dtype: Literal["compute", "float32"] = "compute",
        activation_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.logprob_chunk_size = logprob_chunk_size
        self.head_dtype = head_dtype
        self.activation_checkpointing = activation_checkpointing
        self.trust_remote_code = trust_remote_code
        self.tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, path, trust_remote_code=trust_remote_code)
        self.config = _load(AutoConfig, path, trust_remote_code=trust_remote_code)

    def materialize(self) -> None:
        """Loads the weights, in fp32 (at RPT's learning rate of 1e-6 a bf16 master weight does not move). Does nothing when they are loaded."""
        if hasattr(self, "model"):
            return
        model = _load(AutoModelForCausalLM, self.path, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=self.trust_remote_code)
        if self.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # A policy with dropout could not agree with its engine.
        if getattr(model.config, "attention_dropout", 0.0):
            raise ValueError(f"policy.path={self.path} has attention_dropout={model.config.attention_dropout}; set it to 0 in its config.json")
        self.model = model.train()  # a checkpoint's names are "policy.model." + the Hugging Face name

    @property
    def head_weight(self) -> Tensor:
        """The output embedding, ``[V, D]``."""
        return cast(Tensor, self.model.get_output_embeddings().weight)  # type: ignore[no-untyped-call]

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the input embedding."""
        return self.head_weight is self.model.get_input_embeddings().weight

    def forward(self, tree: PackedTree, *, temperature: float = 1.0, predict: bool = False) -> tuple[Tensor, Tensor]:
        """Scores the M target tokens of a packed tree.

        Returns:
            ``(logprobs [M], entropy [M])`` of the tempered distribution, or with ``predict`` ``(logprobs [M], most likely ids [M])``.
        """
        outputs: Any = self.model.base_model(
            input_ids=tree.token_ids[None], attention_mask=tree.attention_mask(), position_ids=tree.position_ids[None], use_cache=False
        )
        hidden = outputs.last_hidden_state[0][tree.parents]  # [M, D]
        dtype = torch.float32 if self.head_dtype == "float32" else _compute_dtype(hidden)
        hidden, weight = hidden.to(dtype), self.head_weight.to(dtype)
        # Autocast would cast the fp32 product back to bf16.
        with torch.autocast(hidden.device.type, enabled=False):
            logprobs, entropy = chosen_logprobs(hidden, weight, tree.targets, temperature=temperature, chunk_size=self.logprob_chunk_size)
            return (logprobs, most_likely(hidden, weight, chunk_size=self.logprob_chunk_size)) if predict else (logprobs, entropy)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _load(auto_class: Any, path: str, **kwargs: Any) -> Any:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(
            f"policy.path={path}: there is no Hugging Face model folder (no config.json). Give a folder made by save_pretrained, or a hub id"
        )
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except OSError as error:
        raise ValueError(f"policy.path={path} cannot be loaded: {error}") from error
