from __future__ import annotations

import pytest

from rpt_lightning.objectives.rewards.answer import AnswerReward


@pytest.fixture(scope="session")
def answer_reward() -> AnswerReward:
    """One reward for all tests, because starting Math-Verify's process takes a second or two."""
    return AnswerReward(cpu_limit_s=1.0, num_workers=1)
