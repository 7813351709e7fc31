"""A wrong result of a user's own engine is one error with the class, the result and what is expected."""

from __future__ import annotations

import pytest

from rpt_lightning.rollout.engines.base import Sample
from rpt_lightning.rollout.engines.result_check import check_samples
from rpt_lightning.types import GenerationRequest, SamplingSettings

SAMPLING = SamplingSettings(temperature=1.0, max_tokens=4, stop_token_ids=(1,))
REQUESTS = [
    GenerationRequest(task_id=f"d:{i}", prompt_ids=(1, 2), n=2, seed=i, sampling=SAMPLING) for i in range(2)
]
GOOD = Sample((5, 1), (-0.5, -0.1))


def test_samples_pass():
    check_samples("Mine", [[GOOD, GOOD], [GOOD, Sample((1,), (-0.5,))]], REQUESTS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "NoneType None for 2 requests"),
        ([[GOOD, GOOD]], "1 lists for 2 requests"),
        ([GOOD, GOOD], r"for task 'd:0' (list|tuple|Sample|a|\d|int).*"),
        ([[GOOD], [GOOD, GOOD]], "for task 'd:0' 1 completions of 2"),
        ([[GOOD, GOOD], None], "for task 'd:1' NoneType None"),
        ([[GOOD, GOOD], [[5, 1], [5, 1]]], r"for task 'd:1' list \[5, 1\] as a completion"),
        ([[GOOD, "text"], [GOOD, GOOD]], "for task 'd:0' str 'text' as a completion"),
        ([[GOOD, Sample([5, 1], [-0.5, -0.1])], [GOOD, GOOD]], r"Sample .* as a completion"),
        ([[GOOD, Sample((), ())], [GOOD, GOOD]], "a completion of 0 tokens with 0 log-probs"),
        ([[GOOD, Sample((5, 1), (-0.5,))], [GOOD, GOOD]], "a completion of 2 tokens with 1 log-probs"),
        ([[GOOD, Sample(("a",), (-0.5,))], [GOOD, GOOD]], "a completion of str and float"),
        ([[GOOD, Sample((5,), ("x",))], [GOOD, GOOD]], "a completion of int and str"),
    ],
)
def test_anything_else_is_one_error(rows, said):
    with pytest.raises(
        ValueError, match=f"the engine Mine returned .*{said}.*wanted: a list with a list for each request"
    ):
        check_samples("Mine", rows, REQUESTS)
