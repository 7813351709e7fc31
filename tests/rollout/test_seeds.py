from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.rollout.seeds import MAX_SEED, request_seed


def test_the_seed_is_the_same_in_every_process() -> None:
    assert request_seed(1, 2, "doc-7:4") == 5073162065084580022


@given(st.integers(), st.integers(), st.text(), st.integers(0, 2**20 - 1))
def test_seeds_stay_within_what_vllm_takes_and_count_on(
    run_seed: int, version: int, task_id: str, index: int
) -> None:
    seed = request_seed(run_seed, version, task_id, index)
    assert 0 <= seed <= MAX_SEED
    assert seed == request_seed(run_seed, version, task_id) + index


def test_every_part_matters_also_in_the_low_bits_that_torch_looks_at() -> None:
    seeds = [
        request_seed(run, version, f"doc-{doc}:4")
        for run in range(10)
        for version in range(10)
        for doc in range(10)
    ]
    assert len({seed % 2**32 for seed in seeds}) == 1000
    # Concatenation must not confuse (1, 23) with (12, 3).
    assert request_seed(1, 23, "a") != request_seed(12, 3, "a")


def test_torch_ignores_the_high_bits_on_cpu() -> None:
    # This is why the low bits must be hashed too. If this test ever fails, the remark in request_seed is
    # outdated.
    first, second = (torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5 + 2**32))
    assert torch.equal(first, second)


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="first_index=-1"):
        request_seed(0, 0, "a", -1)
