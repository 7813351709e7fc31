"""Log-probs of chosen tokens without ever holding the logits of all of them.

The head's product and the softmax run over chunks of tokens, and the backward pass computes each chunk's logits again, so that peak memory is one
chunk of logits, ``[chunk_size, V]``, instead of ``[N, V]``. The product runs in the dtype of ``hidden`` and ``weight``; softmax, log-probs and entropy
are fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def chosen_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, chunk_size: int = 512) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token and the entropy of the distribution it is drawn from, both of the tempered distribution.

    Args:
        hidden: ``[N, D]`` final hidden states, in the dtype that the product is to run in.
        weight: ``[V, D]`` output embedding, same dtype.
        targets: ``[N]`` int64 token ids.
        temperature: Divides the logits; must be above 0.
        chunk_size: Tokens whose logits exist at the same time.

    Returns:
        ``(logprobs [N], entropy [N])`` in nats, differentiable in ``hidden`` and ``weight``.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; log-probs need a temperature above 0 (score greedy completions at 1.0)")
    logprobs, entropy = _ChosenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, temperature, chunk_size
    )
    return logprobs, entropy


@torch.no_grad()
def most_likely(hidden: Tensor, weight: Tensor, *, chunk_size: int = 512) -> Tensor:
    """The most likely next token after each hidden state ``[N, D]``: ids ``[N]``."""
    chunks = [(part @ weight.T).argmax(-1) for part in torch.split(hidden, chunk_size)]
    return torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.int64, device=hidden.device)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _ChosenLogprobs(torch.autograd.Function):
    """With z = h W^T / T, p = softmax(z), H = entropy(p): d log p_y / dz = 1_y - p and dH / dz = -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_size: int) -> tuple[Tensor, Tensor]:
        dtype = _accumulation_dtype(hidden.dtype)
        logprobs = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        logsumexp = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], chunk_size):
            part = slice(start, start + chunk_size)
            logits = (hidden[part] @ weight.T).to(dtype).div_(temperature)  # [C, V]
            logsumexp[part] = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(-1, targets[part, None])[:, 0] - logsumexp[part]
            probs = (logits - logsumexp[part, None]).exp_()
            entropy[part] = logsumexp[part] - probs.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, logsumexp, entropy)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_logprobs, grad_entropy = grads
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        # Backward runs inside the autocast of the training step, which would round the logits that forward did not round.
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = logsumexp.dtype
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if ctx.needs_input_grad[1] else None
            for start in range(0, hidden.shape[0], ctx.chunk_size):
                part = slice(start, start + ctx.chunk_size)
                logp = (hidden[part] @ weight.T).to(dtype).div_(ctx.temperature).sub_(logsumexp[part, None])  # [C, V]
                if grad_entropy is not None:
                    probs = logp.exp()
                    grad_logits = -(grad_entropy[part, None] * probs) * (logp + entropy[part, None])
                    if grad_logprobs is not None:
                        grad_logits.addcmul_(probs, grad_logprobs[part, None], value=-1)
                else:
                    grad_logits = logp.exp_().mul_(-grad_logprobs[part, None])
                if grad_logprobs is not None:
                    grad_logits.scatter_add_(-1, targets[part, None], grad_logprobs[part, None].to(dtype))
                grad_logits = grad_logits.div_(ctx.temperature).to(hidden.dtype)
                grad_hidden[part] = grad_logits @ weight
                if grad_weight is not None:
                    grad_weight.add_(grad_logits.T @ hidden[part])  # the sum over chunks is held in fp32
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
