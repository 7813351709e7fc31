"""Which of several ranks may load weights into a server.

Tests with real servers cover the rest of the worker (tests/integration/).
"""

from __future__ import annotations

from rpt_lightning.rollout.engines.vllm.worker import PolicyWeights

YES, NO = {"may_load": True}, {"may_load": False}  # dictionaries pass through /collective_rpc unchanged


def test_one_rank_loads_until_it_is_done_or_its_time_is_over():
    worker = PolicyWeights()
    assert [worker.rpt_may_load("run:3", 900), worker.rpt_may_load("run:3", 900)] == [YES, NO]
    assert worker.rpt_may_load("run:4", 900) == YES  # for the next update
    worker.rpt_loaded()
    assert [
        worker.rpt_may_load("run:4", -1),
        worker.rpt_may_load("run:4", 900),
        worker.rpt_may_load("run:4", 900),
    ] == [YES, YES, NO]
