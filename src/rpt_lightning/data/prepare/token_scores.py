"""Score the true token by a proxy's logits: its probability, its rank, and the most likely tokens.

Each score takes only a few passes over the logits, and no softmax over the whole vocabulary is kept. On a CPU
the rows are processed in blocks that stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rpt_lightning.algo.entropy import topk_entropy

# Number of vocabulary neighbours of which `largest` first keeps only the maximum.
GROUP = 64
# Number of logits in a block on a CPU: 4 MB in fp32.
BLOCK_LOGITS = 2**20


def score_logits(logits: Tensor, true_ids: Tensor, num_candidates: int) -> dict[str, Tensor]:
    """Compute the fields of ``DocumentScores`` from logits and true tokens.

    Args:
        logits: Logits [M, V] of any float dtype. The computation is in fp32.
        true_ids: The true tokens [M].
        num_candidates: Number of candidates K. Fields of candidates are [M, K].
    """
    parts = [_score_block(rows.float(), ids, num_candidates) for rows, ids in _blocks(logits, true_ids)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _blocks(logits: Tensor, true_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    num_rows = max(1, BLOCK_LOGITS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(torch.split(logits, num_rows), torch.split(true_ids, num_rows), strict=True)


def _score_block(logits: Tensor, true_ids: Tensor, num_candidates: int) -> dict[str, Tensor]:
    top, candidate_ids = largest(logits, min(num_candidates, logits.shape[1]))  # [M, K]
    highest = top[:, :1]
    log_normalizer = highest + (logits - highest).exp_().sum(-1, keepdim=True).log_()  # [M, 1]
    true_logits = logits.gather(-1, true_ids[:, None])  # [M, 1]
    return {
        "entropy": topk_entropy(top, num_candidates),
        "true_prob": (true_logits - log_normalizer).exp_()[:, 0],
        "true_rank": ranks(logits, true_ids).to(torch.int32),
        "candidate_ids": candidate_ids.to(torch.int32),
        "candidate_probs": (top - log_normalizer).exp_(),
    }


def largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest logits [M, K] in falling order and their ids [M, K].

    Of equal logits the lower id comes first. ``topk`` looks at each logit by itself, while a maximum over
    ``GROUP`` neighbours is a vector operation. The ``k`` largest logits lie in the ``k`` groups with the
    largest maxima, because for a logit elsewhere ``k`` others are not smaller.
    """
    num_groups = logits.shape[1] // GROUP
    if num_groups <= k:
        values, ids = logits.topk(k)
    else:
        positions = torch.arange(logits.shape[1], device=logits.device)
        end = num_groups * GROUP
        groups = logits[:, :end].reshape(-1, num_groups, GROUP).amax(-1).topk(k).indices  # [M, K]
        members = (groups[:, :, None] * GROUP + positions[:GROUP]).flatten(1)  # [M, K * GROUP]
        # The last tokens are too few to form a group.
        members = torch.cat([members, positions[end:].expand(len(logits), -1)], 1)
        values, indices = logits.gather(1, members).topk(k)
        ids = members.gather(1, indices)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def ranks(logits: Tensor, ids: Tensor) -> Tensor:
    """Count the entries of each row of ``logits`` [M, V] that come before its token ``ids`` [M].

    These are larger logits, and equal ones with a lower id (the order of argmax). Comparisons are written as
    0.0 and 1.0. On a CPU, floats are compared and summed several times faster than booleans. The sums are
    exact up to 2^24 tokens.
    """
    chosen = logits.gather(-1, ids[:, None])  # [M, 1]
    positions = torch.arange(logits.shape[1], device=logits.device, dtype=torch.float32)  # [V]
    larger, equal, is_lower_id = (torch.empty_like(logits) for _ in range(3))  # [M, V]
    torch.gt(logits, chosen, out=larger)
    torch.eq(logits, chosen, out=equal)
    torch.lt(positions, ids[:, None].float(), out=is_lower_id)
    return larger.addcmul_(equal, is_lower_id).sum(-1)  # [M]
