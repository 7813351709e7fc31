"""Floating-point operations of a model's passes, a multiply-add as two: the one count that every cost, plan and benchmark here goes by.

Forward 2 a weight and token (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; the head's weights only where a distribution is computed) and 4 x attention
width a permitted pair of tokens; backward twice as much. These are needed operations: what activation checkpointing or a padding computes besides is not
in them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rpt_lightning.policy.packing import PackedTree
    from rpt_lightning.types import TrainSequence

# Layers of other kinds carry a state, whose few operations a token are left out.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What a token and a pair of tokens cost.

    ``body_params`` is what every token is multiplied with: all but embedding and head. ``attention_width`` is query heads x head dimension, summed over
    the layers. Of a mixture of experts all experts are counted, and a sliding window as if it saw everything: both are too much.
    """

    body_params: int
    head_params: int
    attention_width: int


def model_size(model: PreTrainedModel) -> ModelSize:
    """Counted on the model itself, on the meta device too; of sharded weights the whole."""
    embedding: Any = model.get_input_embeddings().weight
    head: Any = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    outer = embedding.numel() if head is embedding else embedding.numel() + head.numel()
    config: Any = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSize(
        body_params=sum(parameter.numel() for parameter in model.parameters()) - outer,
        head_params=head.numel(),
        attention_width=sum(kind in _ATTENTION_LAYERS for kind in kinds)
        * config.num_attention_heads
        * head_dim,
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens fed to a model, tokens whose distribution is computed, and permitted pairs: a token and one that it attends to, itself included.

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
    """The sum; of none, nothing."""
    return sum(works, Work())


def tree_work(tree: PackedTree) -> Work:
    """A token has as many pairs as ancestors, and one with itself. The padding of rows counts nothing."""
    scored_tokens = tree.targets.numel()
    if tree.row_length is not None:
        return Work(
            tokens=sum(tree.row_sizes),
            scored_tokens=scored_tokens,
            pairs=sum(_pairs(0, size) for size in tree.row_sizes),
        )
    return Work(tokens=tree.num_tokens, scored_tokens=scored_tokens, pairs=int((tree.position_ids + 1).sum()))


def sequence_work(sequence: TrainSequence) -> Work:
    """One sequence by itself and whole: its last token is fed too, as the usual padded step does."""
    return Work(
        tokens=sequence.num_tokens,
        scored_tokens=len(sequence.target_ids),
        pairs=_pairs(0, sequence.num_tokens),
    )


def prompt_work(num_tokens: int, *, num_cached: int = 0) -> Work:
    """Reading a prompt whose first tokens are cached. What is sampled behind it is `sampling_work`."""
    return Work(tokens=num_tokens - num_cached, pairs=_pairs(num_cached, num_tokens))


def sampling_work(prompt_tokens: int, sampled_tokens: int) -> Work:
    """Sampling behind a prompt that has been read. The last token is not fed any more.

    >>> sampling_work(10, 3)  # the first comes from the prompt's last token; the second attends to 11, the third to 12
    Work(tokens=2, scored_tokens=3, pairs=23)
    """
    fed = max(0, sampled_tokens - 1)
    return Work(tokens=fed, scored_tokens=sampled_tokens, pairs=_pairs(prompt_tokens, prompt_tokens + fed))


def forward_flops(size: ModelSize, work: Work) -> float:
    """Operations of a forward pass."""
    return float(
        2 * (size.body_params * work.tokens + size.head_params * work.scored_tokens)
        + 4 * size.attention_width * work.pairs
    )


def train_flops(size: ModelSize, work: Work) -> float:
    """Operations of a forward and a backward pass."""
    return 3 * forward_flops(size, work)


def _pairs(before: int, after: int) -> int:
    """Of a sequence's tokens beyond the first ``before``, up to ``after``."""
    return (after * (after + 1) - before * (before + 1)) // 2
