"""The shares of kinds of positions, by numbers worked out by hand, and what holds for any counts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.rollout.position_kinds import ENTROPY_EDGES, PROB_EDGES, KindShares, kind_of, num_kinds

KINDS = num_kinds()


def observed(shares: KindShares, groups: dict[int, tuple[int, int]]) -> None:
    """``groups``: (with a gradient, all) by kind."""
    live, total = ([groups.get(kind, (0, 0))[i] for kind in range(KINDS)] for i in (0, 1))
    shares.observe(live, total)


def test_kinds_are_cells_of_two_bands() -> None:
    probs = [0.0, *PROB_EDGES]
    entropies = [0.0, *ENTROPY_EDGES]
    at_lower_ends = [kind_of(prob, entropy) for prob in probs for entropy in entropies]
    assert at_lower_ends == list(range(KINDS)) == list(range(24))
    below_upper_ends = [
        kind_of(math.nextafter(prob, 0), math.nextafter(entropy, 0))
        for prob in [*PROB_EDGES, 1.0]
        for entropy in [*ENTROPY_EDGES, 99.0]
    ]
    assert below_upper_ends == at_lower_ends


def test_shares_and_acceptance_by_hand() -> None:
    shares = KindShares(floor=0.4, decay=0.5)
    assert [shares.accept_prob(kind) for kind in range(KINDS)] == [1.0] * KINDS
    observed(shares, {2: (6, 8), 5: (1, 8)})
    shares.commit()
    # Overall 7/16. (6 + 4 x 7/16) / 12 = 31/48, (1 + 4 x 7/16) / 12 = 11/48, and 7/16 = 21/48 elsewhere.
    assert [shares.share(kind) for kind in (2, 5, 9)] == pytest.approx([31 / 48, 11 / 48, 21 / 48])
    assert [shares.accept_prob(kind) for kind in (2, 5, 9)] == pytest.approx([1.0, 0.4, 21 / 31])
    observed(shares, {5: (4, 4)})
    shares.commit()
    # Kind 2: 3 of 4. Kind 5: 0.5 + 4 of 4 + 4. Overall 7.5 of 12 = 5/8.
    # (3 + 4 x 5/8) / 8 = 11/16, (4.5 + 4 x 5/8) / 12 = 7/12, and 5/8 elsewhere.
    assert [shares.share(kind) for kind in (2, 5, 9)] == pytest.approx([11 / 16, 7 / 12, 5 / 8])
    assert shares.best_share == pytest.approx(11 / 16)
    assert shares.accept_prob(5) == pytest.approx(28 / 33)


def test_if_nothing_taught_everything_is_accepted() -> None:
    shares = KindShares(floor=0.1, decay=1.0)
    observed(shares, {0: (0, 8)})
    shares.commit()
    assert {shares.accept_prob(kind) for kind in range(KINDS)} == {1.0}


COUNTS = st.tuples(st.integers(0, 40), st.integers(0, 40)).map(lambda pair: (min(pair), max(pair)))


@given(
    st.lists(st.dictionaries(st.integers(0, KINDS - 1), COUNTS), max_size=4),
    st.floats(0.01, 1.0),
    st.floats(0.1, 1.0),
)
def test_no_kind_starves_and_more_of_a_share_is_never_accepted_less(
    steps: list[dict[int, tuple[int, int]]], floor: float, decay: float
) -> None:
    shares = KindShares(floor=floor, decay=decay)
    for step in steps:
        observed(shares, step)
        shares.commit()
    probs = [shares.accept_prob(kind) for kind in range(KINDS)]
    assert max(probs) == 1.0
    assert min(probs) >= floor
    by_share = sorted(range(KINDS), key=shares.share)
    assert [probs[kind] for kind in by_share] == sorted(probs)


def test_a_checkpoint_holds_the_counts_behind_the_last_whole_step() -> None:
    shares = KindShares(floor=0.1, decay=0.9)
    observed(shares, {2: (6, 8)})
    shares.commit()
    state = shares.state_dict()
    observed(shares, {3: (1, 1)})  # the next step has begun
    assert shares.state_dict() == state
    resumed = KindShares(floor=0.1, decay=0.9)
    resumed.load_state_dict(state)
    resumed.commit()  # nothing was observed
    assert resumed.state_dict() == state
    shares.commit()
    assert shares.state_dict() != state
    with pytest.raises(
        ValueError, match=r"--ckpt_path: .*entropy_edges \[1\.5\], and this version has \[1\.0"
    ):
        resumed.load_state_dict(state | {"entropy_edges": [1.5]})
