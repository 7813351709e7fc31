"""The policy, a transformers causal language model with backbone, head and log-probs in one ``forward``.

This ``forward`` makes the policy the root of sharding. Under FSDP2, calling the backbone and then using the
head's weight from outside fails, because tensors and DTensors would mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rpt_lightning.compat.transformers import decoder_layers
from rpt_lightning.policy.family import check_loaded, choose_packing
from rpt_lightning.policy.packing.rows import pack_rows
from rpt_lightning.policy.packing.trees import PackedTree, pack
from rpt_lightning.policy.tree_scores import HeadDtype, head_weight, score
from rpt_lightning.pretrained.text_shape import check_not_quantized, check_sizes
from rpt_lightning.pretrained.tokenizer import as_in_folder, check_vocabulary, read_tokenizer
from rpt_lightning.pretrained.weights import load_causal_lm
from rpt_lightning.types import TokenIds, TrainSequence

# Dropout rates of heads that a causal language model lacks, even if its config.json names them.
OTHER_HEADS = ("classifier_", "summary_")


class Policy(nn.Module):
    """The model being trained.

    Args:
        path: Hugging Face folder (or hub id) of the model and its tokenizer.
        logprob_chunk_size: Number of tokens whose logits exist at the same time. null means 512 on CPU and
            4,096 on GPU.
        head_dtype: "compute" multiplies the head in the precision of the rest (bf16 under autocast).
            "float32" uses fp32, which narrows the gap to an fp32 engine.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its
            activations.
        compile_layers: Compile each layer with torch.compile. This takes minutes at the start and makes steps
            on GPUs faster. null compiles on GPUs only.
        trust_remote_code: Let the model folder run its own Python code. It is off unless you ask for it.
    """

    # Available once `materialize` has run:
    model: PreTrainedModel
    packing: str  # one line that says which packing the model takes, and why

    def __init__(
        self,
        path: str,
        logprob_chunk_size: int | None = None,
        head_dtype: HeadDtype = "compute",
        activation_checkpointing: bool = False,
        compile_layers: bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.path = path
        self.logprob_chunk_size = logprob_chunk_size
        self.head_dtype = head_dtype
        self.activation_checkpointing = activation_checkpointing
        self.compile_layers = compile_layers
        self.shares_prefixes = True
        self.trust_remote_code = trust_remote_code
        where = f"policy.path={path}"
        # Before the tokenizer, which reads config.json too and would be blamed for what is wrong there.
        self.config = _load(AutoConfig.from_pretrained, path, trust_remote_code=trust_remote_code)
        check_not_quantized(self.config, where=where)
        check_sizes(self.config, where=where)
        tokenizer = _load(read_tokenizer, path, trust_remote_code=trust_remote_code)
        self.tokenizer: PreTrainedTokenizerBase = as_in_folder(tokenizer, where=where)
        self.num_tokens: int = self.config.get_text_config().vocab_size  # rows of the embedding
        check_vocabulary(self.tokenizer, self.num_tokens, where=where)

    def train_on(self, device: torch.device) -> None:
        """Settle what depends on the kind of device, before the policy is materialized."""
        if self.compile_layers is None:
            self.compile_layers = device.type == "cuda"

    def materialize(self) -> None:
        """Load the weights in fp32, unless they are loaded already.

        At RPT's learning rate of 1e-6, a bf16 master weight would not change.
        """
        if not hasattr(self, "model"):
            model = _load(
                load_causal_lm,
                self.path,
                where=f"policy.path={self.path}",
                dtype=torch.float32,
                trust_remote_code=self.trust_remote_code,
            )
            self._adopt(model, has_weights=True)

    def materialize_on_meta(self) -> None:
        """Build the model without its weights. sharding.py later reads them into the shards.

        Buffers (rotary frequencies) are computed as usual.
        """
        with init_empty_weights(include_buffers=False):
            model = cast(Any, AutoModelForCausalLM).from_config(
                self.config, dtype=torch.float32, trust_remote_code=self.trust_remote_code
            )
        model.tie_weights()  # the context turns one tensor into two
        self._adopt(model, has_weights=False)

    def _adopt(self, model: PreTrainedModel, *, has_weights: bool) -> None:
        _check_no_dropout(model, self.path)
        _check_no_saved_buffers(model, self.path)
        packing = choose_packing(self.config, path=self.path, trust_remote_code=self.trust_remote_code)
        if has_weights:
            check_loaded(model, packing, path=self.path)
        model.set_attn_implementation(packing.attention)
        self.shares_prefixes = packing.shares_prefixes
        kind = (
            "common prefixes are computed once"
            if packing.reason is None
            else f"every completion with its whole prompt, because {packing.reason}"
        )
        self.packing = f"{type(model).__name__}: {kind}"
        if self.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model.train()  # names in a checkpoint are "policy.model." + the Hugging Face name
        if self.compile_layers:
            for layer in decoder_layers(self.model):
                layer.compile(dynamic=True)

    @property
    def head_weight(self) -> Tensor:
        """The output embedding, ``[V, D]``."""
        return head_weight(self.model)

    @property
    def is_tied(self) -> bool:
        """Whether the output head and the input embedding are one tensor."""
        return self.head_weight is self.model.get_input_embeddings().weight

    def pack(self, sequences: Sequence[TrainSequence], *, max_tokens: int) -> Iterator[PackedTree]:
        """Yield micro-batches of at most ``max_tokens`` input tokens, in the form that the layers take."""
        for sequence in sequences:
            self.check_ids(sequence.prompt_ids + sequence.target_ids)
        return (pack if self.shares_prefixes else pack_rows)(sequences, max_tokens=max_tokens)

    def check_ids(self, token_ids: TokenIds) -> None:
        """Raise ValueError for a token that has no row in the embedding.

        Computing it would raise an IndexError, or kill the process on a GPU.
        """
        if token_ids and max(token_ids) >= self.num_tokens:
            token_id = max(token_ids)
            raise ValueError(
                f"policy.path={self.path}: the token {self.tokenizer.convert_ids_to_tokens(token_id)!r} has "
                f"the id {token_id}, and the model's embedding has {self.num_tokens} rows; save the model "
                "after model.resize_token_embeddings(len(tokenizer)), or use other markers"
            )

    def forward(
        self, tree: PackedTree, *, temperature: float = 1.0, predict: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Score the M target tokens of a packed tree.

        Args:
            tree: The packed tree.
            temperature: Divides the logits of sequences without a temperature of their own.
            predict: Whether to return the most likely ids.

        Returns:
            ``(logprobs [M], entropy [M])`` of the tempered distribution. With ``predict``, the result is
            ``(logprobs [M], most likely ids [M])``.
        """
        return score(
            self.model,
            tree,
            temperature=temperature,
            predict=predict,
            head_dtype=self.head_dtype,
            chunk_size=self.logprob_chunk_size,
        )


def _check_no_dropout(model: nn.Module, path: str) -> None:
    """Raise ValueError if the model has dropout. It could not agree with its engine or resume bit for bit."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise ValueError(f"policy.path={path} has dropout; set its dropout rates to 0 in its config.json")
    rates = {
        name: value
        for name, value in vars(model.config).items()
        if name.endswith(("dropout", "pdrop"))
        and not name.startswith(OTHER_HEADS)
        and isinstance(value, float)
        and value > 0
    }
    if rates:
        raise ValueError(f"policy.path={path} has dropout ({rates}); set it to 0 in its config.json")


def _check_no_saved_buffers(model: nn.Module, path: str) -> None:
    """Raise ValueError if a checkpoint of the model holds weights that are not parameters.

    A family may change such weights outside the optimizer (the expert biases of DeepSeek-V3). They would
    reach neither the engine nor the exported folder.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [name for name in model.state_dict() if name not in parameters]
    if buffers:
        raise ValueError(
            f"policy.path={path}: {len(buffers)} of its weights are not parameters "
            f"({', '.join(buffers[:3])}), so they would reach neither the engine nor an exported folder; use "
            "a model without such weights, for example of the Llama, Qwen2 or Qwen3 family"
        )


def _load(load: Callable[..., Any], path: str, **kwargs: Any) -> Any:
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise ValueError(
            f"policy.path={path}: there is no Hugging Face model folder (no config.json). Give a folder made "
            "by save_pretrained, or a hub id"
        )
    try:
        return load(str(Path(path).expanduser()) if path.startswith("~") else path, **kwargs)
    except (OSError, ArithmeticError, StrictDataclassError) as error:
        raise ValueError(f"policy.path={path} cannot be loaded: {' '.join(str(error).split())}") from error
