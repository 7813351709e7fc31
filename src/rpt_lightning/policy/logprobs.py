"""Log-probs of chosen tokens, computed without holding the logits of all tokens at once.

The head's product and the softmax run over tiles: a chunk of tokens by a chunk of the vocabulary. The
backward pass computes each tile's logits again. Apart from the gradients themselves, the peak memory is a few
tiles instead of several copies of ``[N, V]``.

The outer loop is over the vocabulary. Each row of the weight's gradient is finished before the next begins,
so its sum over tokens can be held in fp32 (fp64 for fp64 input) without a second ``[V, D]``.

The product runs in the dtype of ``hidden``. Softmax, log-probs and entropy are fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Vocabulary entries whose logits exist at the same time. A CPU is fastest with tiles that stay in its cache
# (4 MB with 512 tokens), a GPU with few kernel launches (0.5 GB with 4,096).
CPU_VOCAB_CHUNK = 2048
VOCAB_CHUNK = 32768
# The same for tokens, unless a number is given.
CPU_TOKEN_CHUNK = 512
TOKEN_CHUNK = 4096


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    chunk_size: int = 512,
) -> tuple[Tensor, Tensor]:
    """Compute the log-prob of each target token and the entropy, both of the tempered distribution.

    Args:
        hidden: ``[N, D]`` final hidden states, in the dtype in which the product runs.
        weight: ``[V, D]`` output embedding. If its dtype differs, it is cast tile by tile. This saves a cast
            copy of the weight and of its gradient.
        targets: ``[N]`` int64 token ids.
        bias: ``[V]`` bias of the output head, if it has one (Phi, GPT-J). It is added in the softmax's dtype.
        temperature: Divides the logits. It must be above 0. A tensor ``[N]`` has one for each token.
        chunk_size: Number of tokens whose logits exist at the same time, for one chunk of the vocabulary.

    Returns:
        ``(logprobs [N], entropy [N])`` in nats, differentiable in ``hidden``, ``weight`` and ``bias``.
    """
    if torch.any(torch.as_tensor(temperature) <= 0):
        raise ValueError(
            f"temperature is {temperature}; log-probs need a temperature above 0 "
            "(score greedy completions at 1.0)"
        )
    logprobs, entropy = _ChosenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, temperature, chunk_size
    )
    return logprobs, entropy


@torch.no_grad()
def most_likely(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, chunk_size: int = 512
) -> Tensor:
    """Return the most likely next token after each hidden state ``[N, D]``, as ids ``[N]``.

    Among equally likely tokens, the first wins.
    """
    ids = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    highest = torch.full(hidden.shape[:1], -torch.inf, dtype=hidden.dtype, device=hidden.device)
    for columns in _vocab_chunks(weight):
        weight_part = weight[columns].to(hidden.dtype)
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = hidden[rows] @ weight_part.T
            values, indices = (logits if bias is None else logits + bias[columns].to(logits.dtype)).max(-1)
            ids[rows] = torch.where(values > highest[rows], indices + columns.start, ids[rows])
            highest[rows] = torch.maximum(highest[rows], values)
    return ids


def _of_rows(temperature: float | Tensor, rows: slice) -> float | Tensor:
    """Return the temperature of a chunk of tokens, ``[C, 1]`` if each token has its own."""
    return temperature[rows, None] if isinstance(temperature, Tensor) else temperature


def token_chunk(*, on_gpu: bool) -> int:
    """Return the number of tokens whose logits exist at the same time, if none is given."""
    return TOKEN_CHUNK if on_gpu else CPU_TOKEN_CHUNK


def _vocab_chunks(weight: Tensor) -> list[slice]:
    return _chunks(weight.shape[0], CPU_VOCAB_CHUNK if weight.device.type == "cpu" else VOCAB_CHUNK)


def _chunks(length: int, size: int) -> list[slice]:
    """Cut ``length`` into slices of nearly equal size, at most ``size`` each.

    A small last slice would leave the allocator with blocks that fit nothing else.
    """
    if length:
        size = math.ceil(length / math.ceil(length / size))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, dtype: torch.dtype
) -> Tensor:
    """Compute one tile of logits, ``[C, V']``.

    ``weight`` is already cut to the columns, and ``bias`` is not.
    """
    logits = (hidden @ weight.T).to(dtype)
    return logits if bias is None else logits.add_(bias[columns])


def _within(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the index of each target inside a tile, and whether it lies there at all.

    The index of a target outside the tile has no meaning.
    """
    return (targets - columns.start).clamp(0, columns.stop - columns.start - 1), (
        targets >= columns.start
    ) & (targets < columns.stop)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute ``total += left @ right``, with the sum in the dtype of ``total``."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


class _ChosenLogprobs(torch.autograd.Function):
    """Log-probs and entropy with a hand-written backward pass.

    With z = (h W^T + b) / T, p = softmax(z) and H = entropy(p), the gradients are d log p_y / dz = 1_y - p
    and dH / dz = -p (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float | Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Over the tiles so far, [N] each: the highest logit m, the sum of exp(z - m), the sum of
        # exp(z - m) (z - m), and the target's logit (0 before its tile).
        highest = torch.full(hidden.shape[:1], torch.finfo(dtype).min, dtype=dtype, device=hidden.device)
        sum_exp, sum_exp_shifted, chosen = (
            torch.zeros_like(highest),
            torch.zeros_like(highest),
            torch.zeros_like(highest),
        )
        # Autocast would round a product of fp32 tensors.
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in _vocab_chunks(weight):
                weight_part = weight[columns].to(hidden.dtype)  # [V', D]
                for rows in _chunks(hidden.shape[0], chunk_size):
                    logits = _logits(hidden[rows], weight_part, bias, columns, dtype).div_(
                        _of_rows(temperature, rows)
                    )  # [C, V']
                    index, is_inside = _within(targets[rows], columns)
                    chosen[rows] += logits.gather(-1, index[:, None])[:, 0] * is_inside
                    new_highest = torch.maximum(highest[rows], logits.amax(-1))
                    step = highest[rows] - new_highest
                    decay = step.exp()
                    highest[rows] = new_highest
                    shifted = logits.sub_(new_highest[:, None])
                    exp = shifted.exp()
                    sum_exp_shifted[rows] = (
                        sum_exp_shifted[rows] + sum_exp[rows] * step
                    ) * decay + shifted.mul_(exp).sum(-1)
                    sum_exp[rows] = sum_exp[rows] * decay + exp.sum(-1)
        logsumexp = highest + sum_exp.log()
        entropy = sum_exp.log() - sum_exp_shifted / sum_exp
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp, entropy)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        return chosen - highest - sum_exp.log(), entropy

    @staticmethod
    def backward(
        ctx: Any, *grads: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        if grads[0] is None and grads[1] is None:
            return None, None, None, None, None, None
        # [N], with respect to h W^T + b. Without a gradient of the entropy, each tile needs one pass less.
        grad_logprobs = torch.zeros_like(grads[1]) if grads[0] is None else grads[0] / ctx.temperature
        grad_entropy = None if grads[1] is None else grads[1] / ctx.temperature
        hidden, weight, bias, targets, logsumexp, entropy = ctx.saved_tensors
        dtype = logsumexp.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        # Backward runs inside the autocast of the training step.
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in _vocab_chunks(weight):
                weight_part = weight[columns].to(hidden.dtype)  # [V', D]
                # If it already has the dtype of the sum, this is grad_weight's own memory.
                grad_weight_part = None if grad_weight is None else grad_weight[columns].to(dtype)  # [V', D]
                for rows in _chunks(hidden.shape[0], ctx.chunk_size):
                    logits = _logits(hidden[rows], weight_part, bias, columns, dtype)  # [C, V']
                    logp = logits.div_(_of_rows(ctx.temperature, rows)).sub_(logsumexp[rows, None])
                    if grad_entropy is None:
                        grad = logp.exp_().mul_(-grad_logprobs[rows, None])
                    else:
                        probs = logp.exp()
                        grad = (
                            logp.add_(entropy[rows, None])
                            .mul_(-grad_entropy[rows, None])
                            .sub_(grad_logprobs[rows, None])
                            .mul_(probs)
                        )
                        del probs  # so that one tile less is held while the next one is made
                    index, is_inside = _within(targets[rows], columns)
                    grad.scatter_add_(-1, index[:, None], (grad_logprobs[rows] * is_inside)[:, None])
                    if grad_bias is not None:
                        grad_bias[columns] += grad.sum(0)
                    grad = grad.to(hidden.dtype)
                    if grad_hidden is not None:
                        _add_product(grad_hidden[rows], grad, weight_part)
                    if grad_weight_part is not None:
                        _add_product(grad_weight_part, grad.T, hidden[rows])
                if grad_weight is not None and grad_weight_part is not None:
                    grad_weight[columns] = grad_weight_part
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            grad_weight,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )
