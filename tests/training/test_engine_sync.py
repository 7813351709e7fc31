"""Each check of an engine's weights finds the engine that holds others, and takes part in what the ranks do together."""

from __future__ import annotations

import pytest
import torch
from small_run import SCRIPT, flat_weights
from watched_run import run

from rpt_lightning.rollout.engine import Sample
from rpt_lightning.rollout.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.weight_part import split_part
from rpt_lightning.training.ranks import Ranks
from rpt_lightning.training.rollout_callback import RolloutCallback
from rpt_lightning.training.sync_check import SyncError, sampled_columns, sampled_names


class StaleAfterFirst(ScriptedEngine):
    """Acknowledges every update and keeps the weights of the first: one real optimizer step behind from step 2 on."""

    def _update_weights(self, weights, version):
        if version == 0:
            super()._update_weights(weights, version)
        else:
            for _ in weights:
                pass


class WrongLogprobs(ScriptedEngine):
    """Holds the right weights and computes something else from step 2 on, as a wrong temperature or a stale cache would."""

    def _generate(self, requests):
        samples = super()._generate(requests)
        if self.version == 0:
            return samples
        return [[Sample(s.token_ids, tuple(logprob * 1.25 for logprob in s.logprobs)) for s in row] for row in samples]


@pytest.mark.parametrize(
    ("engine_class", "message"), [(StaleAfterFirst, "compared tensors differ"), (WrongLogprobs, "log-probs of engine and policy")]
)
def test_engine_that_is_not_the_policy_stops_the_run(make_run, tmp_path, engine_class, message):
    engine = engine_class(SCRIPT)
    watch, module, _, error = run(make_run, 5, engine)
    assert isinstance(error, SyncError)
    assert message in str(error)
    assert len(watch.weights) == 1  # step 1 was honest; nothing was trained afterwards
    assert torch.equal(flat_weights(module), watch.weights[0])
    assert engine.events[-1] == "close"


@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_log_probs_of_a_truncating_sampler_are_not_compared(make_run, truncation, monkeypatch):
    said = []
    monkeypatch.setattr("rpt_lightning.training.rollout_callback.rank_zero_info", said.append)
    watch, _, _, error = run(make_run, 2, WrongLogprobs(SCRIPT), rollout_options=truncation)
    assert error is None
    assert len(watch.batches) == 2
    assert sum("are not compared" in line for line in said) == 1
    _, _, _, error = run(make_run, 2, StaleAfterFirst(SCRIPT), rollout_options=truncation)
    assert "compared tensors differ" in str(error)


class Reads(ScriptedEngine):
    """Keeps which tensors were read back."""

    def _read_weights(self, names):
        self.__dict__.setdefault("reads", []).append(tuple(names))
        return super()._read_weights(names)


def test_each_check_looks_at_the_next_tensors_however_versions_advance(make_run):
    engine = Reads(SCRIPT)
    _, module, _, _ = run(make_run, 20, engine, module_options={"optimizer_steps_per_batch": 4}, rollout_options={"verify_sequences": 0})
    assert [event for event in engine.events if event.startswith("update")] == [f"update {4 * step}" for step in range(5)]
    names = tuple(dict(module.policy.model.named_parameters(remove_duplicate=False)))
    reads = [{split_part(name)[0] for name in read} for read in engine.reads]
    assert reads == [set(sampled_names(names, turn, 8)) for turn in range(5)]
    assert set().union(*reads) == set(names)
    columns = [split_part(name)[1] for read in engine.reads for name in read if name.startswith("lm_head")]
    assert columns == [sampled_columns(module.policy.head_weight.shape[1], turn, 8) for turn in range(5)]


def test_a_rank_without_completions_takes_part_in_the_policys_passes(make_run, monkeypatch):
    trainer, module, data = make_run(1)
    trainer.fit(module, data)
    rollout = next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
    passes = []
    module.policy.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(Ranks, "max", lambda self, number: torch.tensor(2.0))
    difference = rollout._sync.check_logprobs(trainer, module, (), temperature=1.0)
    assert len(passes) == 2  # as many as the rank that needs most
    assert difference["sync/logprob_diff_max"] == 0
