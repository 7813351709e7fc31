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

from rpt_lightning.compat.torch import map_tensors
from rpt_lightning.compat.transformers import decoder_layers
from rpt_lightning.policy.adapter import (
    Adapter,
    adapter_parameters,
    add_adapter,
    hold_in_bf16,
    merge_folder,
    start_adapter,
)
from rpt_lightning.policy.packing.rows import pack_rows
from rpt_lightning.policy.packing.trees import PackedTree, pack
from rpt_lightning.policy.packing_choice import check_loaded, choose_packing
from rpt_lightning.policy.tree_scores import HeadDtype, head_weight, score
from rpt_lightning.pretrained.adapter_folder import (
    AdapterFolder,
    check_base,
    is_adapter_folder,
    read_adapter_folder,
)
from rpt_lightning.pretrained.text_shape import check_not_quantized, check_sizes
from rpt_lightning.pretrained.tokenizer import as_in_folder, check_vocabulary, read_tokenizer
from rpt_lightning.pretrained.weights import load_causal_lm
from rpt_lightning.pretrained.weights_hash import of_first_rank, weights_hash
from rpt_lightning.types import TokenIds, TrainSequence

# Dropout rates of heads that a causal language model lacks, even if its config.json names them.
OTHER_HEADS = ("classifier_", "summary_")


class Policy(nn.Module):
    """The model being trained.

    Args:
        path: Hugging Face folder (or hub id) of the model and its tokenizer, or a folder with an adapter in
            peft's format, which is merged into its base. With `adapter`, training continues it instead.
        logprob_chunk_size: Number of tokens whose logits exist at the same time. null means 512 on CPUs and
            4,096 on GPUs.
        head_dtype: "compute" multiplies the head in the precision of the rest (bf16 under autocast).
            "float32" uses fp32, which narrows the gap to an fp32 engine.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping its
            activations.
        compile_layers: Compile each layer with torch.compile. This takes minutes at the start and makes steps
            on GPUs faster. null compiles on GPUs only.
        trust_remote_code: Allow the model folder to run its own Python code.
        adapter: Train a low-rank adapter (LoRA) and leave the model's own weights as they are. null trains
            all weights.
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
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.adapter = adapter
        self.adapter_folder: AdapterFolder | None = (
            read_adapter_folder(path) if is_adapter_folder(path) else None
        )
        # Where configuration, tokenizer and base weights are.
        self.model_path = path if self.adapter_folder is None else self.adapter_folder.base
        self.base_hash: str | None = None  # of the weights that an adapter belongs to
        if adapter is not None:
            _check_continues(adapter, self.adapter_folder)
            self.register_state_dict_post_hook(_drop_frozen)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_expect_adapter_only)  # type: ignore[no-untyped-call]
        self.logprob_chunk_size = logprob_chunk_size
        self.head_dtype = head_dtype
        self.activation_checkpointing = activation_checkpointing
        self.compile_layers = compile_layers
        self.shares_prefixes = True
        self.train_device = torch.device("cpu")
        self.trust_remote_code = trust_remote_code
        where = f"policy.path={path}"
        # Before the tokenizer, which reads config.json too and would be blamed for what is wrong there.
        self.config = _load(AutoConfig.from_pretrained, self.model_path, trust_remote_code=trust_remote_code)
        check_not_quantized(self.config, where=where)
        check_sizes(self.config, where=where)
        tokenizer = _load(read_tokenizer, self.model_path, trust_remote_code=trust_remote_code)
        self.tokenizer: PreTrainedTokenizerBase = as_in_folder(tokenizer, where=where)
        self.num_tokens: int = self.config.get_text_config().vocab_size  # rows of the embedding
        check_vocabulary(self.tokenizer, self.num_tokens, where=where)

    def train_on(self, device: torch.device) -> None:
        """Settle what depends on the kind of device, before the policy is materialized."""
        self.train_device = device
        if self.compile_layers is None:
            self.compile_layers = device.type == "cuda"

    def materialize(self) -> None:
        """Load the weights in fp32, unless they are loaded already.

        At RPT's learning rate of 1e-6, a bf16 master weight would not change. Frozen weights may be bf16
        (`Adapter.base_dtype`).
        """
        if not hasattr(self, "model"):
            model = _load(
                load_causal_lm,
                self.model_path,
                where=f"policy.path={self.path}",
                dtype=torch.float32,
                trust_remote_code=self.trust_remote_code,
            )
            if self.adapter_folder is not None and self.adapter is None:
                self.check_base()
                merge_folder(model, self.adapter_folder)
            self._adopt(model, has_weights=True)
            if self.adapter is not None:
                map_tensors(
                    self.model,
                    lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor,
                )
                self.start_adapter()

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
        packing = choose_packing(
            self.config,
            path=self.model_path,
            trust_remote_code=self.trust_remote_code,
            device=self.train_device,
        )
        if has_weights:
            check_loaded(model, packing, path=self.model_path)
        if self.adapter is not None:
            where = f"policy.path={self.path}"
            add_adapter(model, self.adapter, where=where)
            if self.adapter.base_dtype == "bfloat16":
                hold_in_bf16(model, where=where)
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

    def start_adapter(self) -> None:
        """Set the adapter's first values and remember which base it belongs to. A collective.

        A is drawn from the run's seed, and B is 0, unless the policy's folder holds an adapter.
        """
        self.check_base()
        start_adapter(
            self.model,
            seed=int(of_first_rank(lambda: str(torch.initial_seed()))),
            given=None if self.adapter_folder is None else self.adapter_folder.tensors(),
            where=f"policy.path={self.path}",
        )

    def check_base(self) -> None:
        """Compute the hash of the base's weights. A collective.

        Raises:
            ValueError: The policy's folder holds an adapter that was trained on other weights.
        """
        where = f"policy.path={self.path}"
        self.base_hash = of_first_rank(lambda: weights_hash(self.model_path, where=where))
        if self.adapter_folder is not None:
            check_base(self.base_hash, self.adapter_folder.base_hash, where=where, base=self.model_path)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizer changes: all, or those of the adapter."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def named_adapter(self) -> list[tuple[str, nn.Parameter]]:
        """Return the adapter's parameters by their names in ``model``. Empty before `materialize`."""
        return sorted(adapter_parameters(self.model)) if hasattr(self, "model") else []

    def saved_shapes(self) -> dict[str, list[int]]:
        """Return the shapes of the weights that a checkpoint holds: all, or those of the adapter."""
        held = self.model.state_dict().items() if self.adapter is None else self.named_adapter()
        return {name: list(weight.shape) for name, weight in held}

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


def _check_continues(adapter: Adapter, folder: AdapterFolder | None) -> None:
    """Raise ValueError if the policy's folder holds an adapter with other settings than these."""
    if folder is None:
        return
    targets = folder.targets if adapter.targets == "all-linear" else tuple(sorted(set(adapter.targets)))
    given = (adapter.rank, adapter.alpha, targets, adapter.rslora)
    if given != (folder.rank, folder.alpha, folder.targets, folder.rslora):
        raise ValueError(
            f"policy.path={folder.path} holds an adapter with rank {folder.rank}, alpha {folder.alpha:g}, "
            f"targets {list(folder.targets)} and rslora {folder.rslora}, which differ from "
            "model.policy.adapter; give the same to continue it, or merge it into its base first "
            "(rpt export --form merged) to train a new adapter"
        )


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep only what is trained in a state dict of a policy with an adapter."""
    assert isinstance(module, Policy)
    kept = {f"{prefix}model.{name}" for name, _ in module.named_adapter()}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _expect_adapter_only(module: nn.Module, found: Any) -> None:
    """Do not miss the frozen weights in a state dict that is loaded into a policy with an adapter."""
    assert isinstance(module, Policy)
    ends = tuple(f"model.{name}" for name, _ in module.named_adapter())
    found.missing_keys[:] = [name for name in found.missing_keys if name.endswith(ends)]


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
