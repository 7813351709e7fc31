"""Chunked log-probs against the plain formula, in values, gradients and memory."""

from __future__ import annotations

import pytest
import torch

from rpt_lightning.policy import logprobs as module
from rpt_lightning.policy.logprobs import chosen_logprobs, most_likely, token_chunk


def plain(hidden, weight, targets, temperature, bias=0.0):
    logp = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("vocab_chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [0.8, 2.5])
def test_values_and_gradients(chunk_size, vocab_chunk, temperature, monkeypatch):
    monkeypatch.setattr(module, "CPU_VOCAB_CHUNK", vocab_chunk)
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
        mine = torch.autograd.grad(
            sum(upstream[i] @ ours[i] for i in which), (hidden, weight), retain_graph=True
        )
        theirs = torch.autograd.grad(
            sum(upstream[i] @ reference[i] for i in which), (hidden, weight), retain_graph=True
        )
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("vocab_chunk", [4, 100])
def test_a_heads_bias_is_in_values_and_gradients(vocab_chunk, monkeypatch):
    monkeypatch.setattr(module, "CPU_VOCAB_CHUNK", vocab_chunk)
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 5), (13, 5), (13,))
    )
    targets, upstream = torch.randint(13, (7,)), torch.randn(2, 7, dtype=torch.float64)
    ours = chosen_logprobs(hidden, weight, targets, bias=bias, temperature=0.8, chunk_size=3)
    reference = plain(hidden, weight, targets, 0.8, bias)
    mine = torch.autograd.grad(sum(upstream[i] @ ours[i] for i in (0, 1)), (hidden, weight, bias))
    theirs = torch.autograd.grad(sum(upstream[i] @ reference[i] for i in (0, 1)), (hidden, weight, bias))
    for a, b in zip((*ours, *mine), (*reference, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert torch.equal(
        most_likely(hidden, weight, bias=bias, chunk_size=2), (hidden @ weight.T + bias).argmax(-1)
    )


def test_hand_computed():
    """Logits (ln 3, 0) give probabilities 3/4 and 1/4."""
    logprobs, entropy = chosen_logprobs(
        torch.tensor([[1.0986123]]), torch.tensor([[1.0], [0.0]]), torch.tensor([0]), temperature=1.0
    )
    assert logprobs.item() == pytest.approx(-0.2876821, abs=1e-6)  # ln 0.75
    assert entropy.item() == pytest.approx(0.5623351, abs=1e-6)  # -(0.75 ln 0.75 + 0.25 ln 0.25)


def test_nothing_larger_than_a_tile_and_the_gradients_is_made(monkeypatch):
    monkeypatch.setattr(module, "CPU_VOCAB_CHUNK", 100)
    sizes = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.add(out.numel())
            return out

    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with Watch():
        logprobs, entropy = chosen_logprobs(
            hidden, weight, torch.zeros(64, dtype=torch.int64), temperature=1.0, chunk_size=8
        )
        (logprobs.sum() + entropy.sum()).backward()
    assert sorted(sizes)[-2:] == [8 * 100, 1000 * 4]  # a tile, and the weight with its gradient


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_a_vocabulary_chunk_of_far_higher_or_lower_logits_does_not_overflow(offset, monkeypatch):
    monkeypatch.setattr(module, "CPU_VOCAB_CHUNK", 3)
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    weight[3:] += offset
    targets = torch.tensor([1, 4])
    for mine, theirs in zip(
        chosen_logprobs(hidden, weight, targets), plain(hidden, weight, targets, 1.0), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_no_targets():
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    logprobs, entropy = chosen_logprobs(hidden, weight, torch.empty(0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(9, 4))
    assert most_likely(hidden, weight).shape == (0,)


def test_most_likely_is_argmax_with_ties_too(monkeypatch):
    # Exact products, many of which are equal.
    hidden, weight = torch.randint(-3, 4, (40, 4)).float(), torch.randint(-3, 4, (9, 4)).float()
    for vocab_chunk in (1, 4, 9):
        monkeypatch.setattr(module, "CPU_VOCAB_CHUNK", vocab_chunk)
        assert torch.equal(most_likely(hidden, weight, chunk_size=2), (hidden @ weight.T).argmax(-1))


def test_only_what_is_asked_for_gets_a_gradient():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([0, 5, 8])
    for needs in ((True, False), (False, True)):
        inputs = [
            tensor.clone().requires_grad_(need) for tensor, need in zip((hidden, weight), needs, strict=True)
        ]
        chosen_logprobs(*inputs, targets)[0].sum().backward()
        reference = [
            tensor.clone().requires_grad_(need) for tensor, need in zip((hidden, weight), needs, strict=True)
        ]
        plain(*reference, targets, 1.0)[0].sum().backward()
        for mine, theirs in zip(inputs, reference, strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)


def test_bf16_product_with_an_fp32_weight(monkeypatch):
    """The fp32 weight is multiplied as its bf16 cast.

    Its gradient is summed over all tokens before it is rounded.
    """
    monkeypatch.setattr(module, "CPU_VOCAB_CHUNK", 5)
    torch.manual_seed(0)
    hidden = torch.randn(600, 8).bfloat16().requires_grad_()
    weight = torch.randn(17, 8, requires_grad=True)
    targets = torch.randint(17, (600,))
    cast = weight.detach().bfloat16().requires_grad_()
    mixed, same = (
        chosen_logprobs(hidden, weight, targets, chunk_size=32),
        chosen_logprobs(hidden, cast, targets, chunk_size=32),
    )
    for mine, theirs in zip(mixed, same, strict=True):
        assert torch.equal(mine, theirs)
    mixed_grads = torch.autograd.grad(mixed[0].sum(), (hidden, weight))
    same_grads = torch.autograd.grad(same[0].sum(), (hidden, cast))
    assert [grad.dtype for grad in mixed_grads] == [torch.bfloat16, torch.float32]
    assert torch.equal(mixed_grads[0], same_grads[0])
    assert torch.equal(mixed_grads[1].bfloat16(), same_grads[1])
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, cast)]
    expected = torch.autograd.grad(plain(*exact, targets, 1.0)[0].sum(), exact)
    for mine, theirs in zip(mixed_grads, expected, strict=True):
        assert (mine.double() - theirs).norm() < 5e-3 * theirs.norm()


def test_temperature_zero_is_refused():
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        chosen_logprobs(torch.randn(2, 4), torch.randn(9, 4), torch.tensor([0, 1]), temperature=0.0)


def test_an_fp32_head_is_fp32_under_autocast():
    """Neither the forward nor the backward pass may compute the logits in bf16.

    Both run inside the autocast of the training step.
    """
    torch.manual_seed(0)
    hidden = (3 * torch.randn(6, 8)).requires_grad_()
    weight = torch.randn(17, 8, requires_grad=True)
    targets = torch.randint(17, (6,))
    expected = plain(hidden, weight, targets, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = chosen_logprobs(hidden, weight, targets)
        gradients = torch.autograd.grad(actual[0].sum(), (hidden, weight))
    for mine, theirs in zip(
        (*actual, *gradients),
        (*expected, *torch.autograd.grad(expected[0].sum(), (hidden, weight))),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_gpu_takes_more_tokens_at_a_time_unless_a_number_is_given():
    assert (token_chunk(on_gpu=False), token_chunk(on_gpu=True)) == (512, 4096)
