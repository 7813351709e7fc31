"""Patches: random changes come through bit for bit, and the smallest form is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpt_lightning.rollout.weight_sync.patch import (
    Patch,
    apply_patch,
    decode_gaps,
    encode_gaps,
    find_changes,
    make_patch,
)

INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every pattern of bits may come: NaNs with all payloads, infinities, zeros of both signs."""
    integers = INTEGERS[dtype]
    info = torch.iinfo(integers)
    bits = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64)
    return bits.to(integers).view(dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(INTEGERS[one.dtype]), other.view(INTEGERS[other.dtype]))


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    share=st.sampled_from([0.0, 0.001, 0.03, 0.3, 0.9, 1.0]),
    whole_rows=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_random_changes_come_through_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, share: float, whole_rows: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, other = random_bits(shape, dtype, generator), random_bits(shape, dtype, generator)
    drawn = torch.rand((*shape[:-1], 1) if whole_rows else shape, generator=generator) < share
    new = torch.where(drawn, other.view(INTEGERS[dtype]), old.view(INTEGERS[dtype])).view(dtype)
    changes = find_changes(old, new)
    assert changes.num_changed == int((old.view(INTEGERS[dtype]) != new.view(INTEGERS[dtype])).sum())
    assert changes.block in (1, shape[-1], math.prod(shape))
    patch, held = make_patch(new, changes), old.clone()
    apply_patch(held, patch)
    assert same_bits(held, new)
    # At most the whole tensor, and one byte for every 255 blocks besides.
    assert patch.num_bytes <= 1 + new.nbytes + new.numel() // 255
    assert changes.num_bytes <= patch.num_bytes <= changes.num_bytes + new.numel() // 255


def test_bits_that_compare_equal_or_unequal_as_numbers() -> None:
    """0 == -0 and NaN != NaN, but only the bits count."""
    old = torch.tensor([0.0, float("nan"), 1.0, 2.0], dtype=torch.bfloat16)
    new = torch.tensor([-0.0, float("nan"), 1.0, 2.0], dtype=torch.bfloat16)
    assert find_changes(old, new).num_changed == 1
    payload = old.clone()
    payload.view(torch.int16)[1] ^= 1  # another NaN
    assert payload[1].isnan()
    changes = find_changes(old, payload)
    assert changes.num_changed == 1
    apply_patch(old, make_patch(payload, changes))
    assert same_bits(old, payload)


@pytest.mark.parametrize(
    ("changed", "dtype", "block", "num_bytes"),
    [
        # 100 rows of 50 entries. An entry takes its size and a byte, a row 50 sizes and a byte.
        (lambda t: t.view(-1)[:7].add_(1), torch.bfloat16, 1, 7 * 3),
        (lambda t: t[3:5].add_(1), torch.bfloat16, 50, 2 * 101),
        (lambda t: t[3:5].add_(1), torch.float32, 50, 2 * 201),
        (lambda t: t[:, :49].add_(1), torch.bfloat16, 5000, 10_001),
        (lambda t: t.add_(1), torch.float32, 5000, 20_001),
        (lambda t: t, torch.float32, 1, 0),
    ],
)
def test_the_smallest_form_is_chosen(changed, dtype: torch.dtype, block: int, num_bytes: int) -> None:
    old = torch.zeros(100, 50, dtype=dtype)
    new = old.clone()
    changed(new)
    changes = find_changes(old, new)
    assert (changes.block, changes.num_bytes) == (block, num_bytes)
    patch = make_patch(new, changes)
    assert patch.num_bytes == num_bytes
    apply_patch(old, patch)
    assert torch.equal(old, new)


@given(st.sets(st.integers(0, 100_000), max_size=60))
def test_gaps(places: set[int]) -> None:
    numbers = torch.tensor(sorted(places), dtype=torch.int64)
    encoded = encode_gaps(numbers)
    assert decode_gaps(encoded).tolist() == numbers.tolist()
    assert len(encoded) <= len(numbers) + max(places, default=0) // 255


def test_gaps_by_hand() -> None:
    # 254 unchanged blocks are one byte, 255 are two, 510 are three.
    assert encode_gaps(torch.tensor([254])).tolist() == [254]
    assert encode_gaps(torch.tensor([255])).tolist() == [255, 0]
    assert encode_gaps(torch.tensor([0, 511])).tolist() == [0, 255, 255, 0]


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (Patch(1, torch.tensor([7, 255], dtype=torch.uint8), torch.ones(1, 1)), "cut off"),
        (Patch(1, torch.tensor([7]), torch.ones(1, 1)), "another type"),
        (Patch(1, torch.tensor([6], dtype=torch.uint8), torch.ones(1, 1)), "block 6 lies behind the end"),
        (
            Patch(1, torch.tensor([1, 1], dtype=torch.uint8), torch.ones(1, 1)),
            r"\(1, 1\) values for 2 blocks",
        ),
        (Patch(4, torch.tensor([0], dtype=torch.uint8), torch.ones(1, 4)), "blocks of 4 entries"),
        (Patch(1, torch.tensor([0], dtype=torch.uint8), torch.ones(1, 1).half()), "torch.float16 do not fit"),
    ],
)
def test_a_patch_that_does_not_fit_changes_nothing(patch: Patch, message: str) -> None:
    tensor = torch.zeros(6)
    with pytest.raises(ValueError, match=message):
        apply_patch(tensor, patch)
    assert tensor.eq(0).all()


def test_one_step_at_a_small_learning_rate_is_small() -> None:
    """AdamW's first step moves every weight by the learning rate. In bf16, few of them change."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 256, generator=generator) * 0.02  # as models are initialized
    moved = weight + 1e-6 * torch.randn(weight.shape, generator=generator).sign()
    changes = find_changes(weight.bfloat16(), moved.bfloat16())
    assert 0 < changes.num_changed / weight.numel() < 0.05
    assert changes.num_bytes < 0.08 * 2 * weight.numel()
