"""Chunked log-probs against the plain formula: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch

from rpt_lightning.policy.logprobs import chosen_logprobs, most_likely


def plain(hidden, weight, targets, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [0.8, 1.0, 2.5])
def test_values_and_gradients(chunk_size, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(13, (7,))
    upstream = torch.randn(2, 7, dtype=torch.float64)
    ours = chosen_logprobs(hidden, weight, targets, temperature=temperature, chunk_size=chunk_size)
    reference = plain(hidden, weight, targets, temperature)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    for which in ((0,), (1,), (0, 1)):  # log-probs alone, entropy alone, both
        mine = torch.autograd.grad(sum(upstream[i] @ ours[i] for i in which), (hidden, weight), retain_graph=True)
        theirs = torch.autograd.grad(sum(upstream[i] @ reference[i] for i in which), (hidden, weight), retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_hand_computed():
    """Logits (ln 3, 0): probabilities 3/4 and 1/4."""
    logprobs, entropy = chosen_logprobs(torch.tensor([[1.0986123]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0]), temperature=1.0)
    assert logprobs.item() == pytest.approx(-0.2876821, abs=1e-6)  # ln 0.75
    assert entropy.item() == pytest.approx(0.5623351, abs=1e-6)  # -(0.75 ln 0.75 + 0.25 ln 0.25)


def test_full_logits_never_exist():
    """With a frozen head, no tensor as large as [N, V] may be made in forward or backward."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4)
    with Watch():
        logprobs, _ = chosen_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64), temperature=1.0, chunk_size=8)
        logprobs.sum().backward()
    assert largest == 8 * 1000


def test_no_targets_and_greedy():
    logprobs, entropy = chosen_logprobs(torch.randn(0, 4), torch.randn(9, 4), torch.empty(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    assert torch.equal(most_likely(hidden, weight, chunk_size=2), (hidden @ weight.T).argmax(-1))


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        chosen_logprobs(torch.randn(2, 4), torch.randn(9, 4), torch.tensor([0, 1]), temperature=0.0)


def test_gradient_of_an_fp32_head_is_fp32_under_autocast():
    """Backward runs inside the training step's autocast; it must not compute the logits in bf16 again."""
    torch.manual_seed(0)
    hidden = (3 * torch.randn(6, 8)).requires_grad_()
    weight = torch.randn(17, 8, requires_grad=True)
    targets = torch.randint(17, (6,))
    expected = torch.autograd.grad(plain(hidden, weight, targets, 1.0)[0].sum(), (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            logprobs, _ = chosen_logprobs(hidden, weight, targets)
        actual = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
