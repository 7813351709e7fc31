"""Count the floating-point operations of a model's passes. Every cost, plan and benchmark uses this count.

A multiply-add is two operations. The forward pass takes 2 operations for each weight and token (Kaplan et al.
2020, arXiv:2001.08361, section 2.1) and 4 x attention width for each permitted pair of tokens. The head's
weights count only for tokens whose distribution is computed. The backward pass takes twice as many
operations: once for the gradient of the inputs and once for that of the weights, which frozen weights do not
need. The count includes only necessary work, so it leaves out padding and what activation checkpointing
recomputes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rpt_lightning.policy.packing.trees import PackedTree
    from rpt_lightning.types import TrainSequence

# Other kinds of layers carry a state. They take few operations a token, which are not counted.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What one token and one pair of tokens cost.

    ``body_params`` is the number of weights that every token is multiplied with, which is all except the
    embedding and the head. ``attention_width`` is query heads x head dimension, summed over the layers. With
    an adapter, ``frozen_body_params`` weights of the body are not trained, and neither is the head
    (``head_is_frozen``).

    The count is too high for two kinds of model: it includes all experts of a mixture of experts, and treats
    a sliding window as full attention.
    """

    body_params: int
    head_params: int
    attention_width: int
    frozen_body_params: int = 0
    head_is_frozen: bool = False


def model_size(model: PreTrainedModel) -> ModelSize:
    """Count the sizes on the model itself. It may be on the meta device. Sharded weights count in full."""
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    outer = embedding.numel() if head is embedding else embedding.numel() + head.numel()
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return ModelSize(
        body_params=sum(parameter.numel() for parameter in model.parameters()) - outer,
        frozen_body_params=max(0, frozen - outer),
        head_is_frozen=not head.requires_grad,
        head_params=head.numel(),
        attention_width=sum(kind in _ATTENTION_LAYERS for kind in kinds)
        * config.num_attention_heads
        * head_dim,
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """The tokens and pairs of tokens that a model processes.

    ``tokens`` are fed to the model, and the distribution is computed for ``scored_tokens`` of them. ``pairs``
    counts each token with every token that it attends to, itself included.

    >>> Work(tokens=2, scored_tokens=1, pairs=3) + 2 * Work(tokens=1, pairs=1)
    Work(tokens=4, scored_tokens=1, pairs=5)
    """

    tokens: float = 0
    scored_tokens: float = 0
    pairs: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens,
            scored_tokens=self.scored_tokens + other.scored_tokens,
            pairs=self.pairs + other.pairs,
        )

    def __rmul__(self, factor: float) -> Work:
        return Work(
            tokens=factor * self.tokens, scored_tokens=factor * self.scored_tokens, pairs=factor * self.pairs
        )


def add_works(works: Iterable[Work]) -> Work:
    """Return the sum, or ``Work()`` if there is nothing to add."""
    return sum(works, Work())


def tree_work(tree: PackedTree) -> Work:
    """Return the work of a packed tree.

    A token forms a pair with each of its ancestors and one with itself. The padding of rows does not count.
    """
    scored_tokens = tree.targets.numel()
    if tree.row_length is not None:
        return Work(
            tokens=sum(tree.row_sizes),
            scored_tokens=scored_tokens,
            pairs=sum(_pairs(0, size) for size in tree.row_sizes),
        )
    return Work(tokens=tree.num_tokens, scored_tokens=scored_tokens, pairs=int((tree.position_ids + 1).sum()))


def sequence_work(sequence: TrainSequence) -> Work:
    """Return the work of one whole sequence by itself.

    The last token is fed too, as in a usual padded step.
    """
    return Work(
        tokens=sequence.num_tokens,
        scored_tokens=len(sequence.target_ids),
        pairs=_pairs(0, sequence.num_tokens),
    )


def prompt_work(num_tokens: int, *, num_cached: int = 0) -> Work:
    """Return the work of reading a prompt whose first tokens are cached.

    `sampling_work` covers what is sampled after it.
    """
    return Work(tokens=num_tokens - num_cached, pairs=_pairs(num_cached, num_tokens))


def sampling_work(prompt_tokens: int, sampled_tokens: int) -> Work:
    """Return the work of sampling after a prompt that has been read. The last sampled token is not fed.

    In the example, the prompt's last token gives the first sampled token. The second attends to 11 tokens
    and the third to 12.

    >>> sampling_work(10, 3)
    Work(tokens=2, scored_tokens=3, pairs=23)
    """
    fed = max(0, sampled_tokens - 1)
    return Work(tokens=fed, scored_tokens=sampled_tokens, pairs=_pairs(prompt_tokens, prompt_tokens + fed))


def forward_flops(size: ModelSize, work: Work) -> float:
    """Return the operations of a forward pass."""
    return float(
        2 * (size.body_params * work.tokens + size.head_params * work.scored_tokens)
        + 4 * size.attention_width * work.pairs
    )


def train_flops(size: ModelSize, work: Work) -> float:
    """Return the operations of a forward and a backward pass.

    The gradient of the inputs counts in every layer, although the layers below the first adapter do not need
    it.
    """
    frozen = 2 * (
        size.frozen_body_params * work.tokens + size.head_is_frozen * size.head_params * work.scored_tokens
    )
    return 3 * forward_flops(size, work) - frozen


def _pairs(before: int, after: int) -> int:
    """Count the pairs of a sequence's tokens from position ``before`` up to ``after``."""
    return (after * (after + 1) - before * (before + 1)) // 2
