"""Each check finds an engine that holds other weights, and takes part in what the ranks do together."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from real_runs import SomeAreRight, differences, traces
from small_run import SCRIPT, flat_weights
from watched_run import run

from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.engines.base import Sample
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import EngineCheck, Sampling
from rpt_lightning.rollout.weight_sync.weight_part import split_part
from rpt_lightning.training.callbacks.logs import RolloutSamples, StepLog
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import RunCheckpoint, last_checkpoint
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.engine_check import engine_sync
from rpt_lightning.training.engine_check.logprob_samples import drawn_completions, drawn_tokens
from rpt_lightning.training.engine_check.sync_check import SyncError, sampled_columns, sampled_names


class StaleAfterFirst(ScriptedEngine):
    """Acknowledges every update but keeps the weights of the first.

    So it is one real optimizer step behind from step 2 on.
    """

    def _update_weights(self, weights, version):
        if version == 0:
            super()._update_weights(weights, version)
        else:
            for _ in weights:
                pass


class WrongLogprobs(ScriptedEngine):
    """Holds the right weights but computes something else from step 2 on.

    A wrong temperature or a stale cache would do so.
    """

    def _generate(self, requests):
        samples = super()._generate(requests)
        if self.version == 0:
            return samples
        return [
            [Sample(s.token_ids, tuple(logprob * 1.25 for logprob in s.logprobs)) for s in row]
            for row in samples
        ]


@pytest.mark.parametrize(
    ("engine_class", "message"),
    [(StaleAfterFirst, "compared tensors differ"), (WrongLogprobs, "log-probs of engine and policy")],
)
def test_engine_that_is_not_the_policy_stops_the_run(make_run, tmp_path, engine_class, message):
    engine = engine_class(SCRIPT)
    watch, module, _, error = run(make_run, 5, engine)
    assert isinstance(error, SyncError)
    assert message in str(error)
    assert error.culprit == "engine"
    assert len(watch.weights) == 1  # step 1 was honest; nothing was trained afterwards
    assert torch.equal(flat_weights(module), watch.weights[0])
    assert engine.events[-1] == "close"


@pytest.mark.parametrize("truncation", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_log_probs_of_a_truncating_sampler_are_not_compared(make_run, truncation, monkeypatch):
    options = {"sampling": Sampling(max_completion_tokens=32, **truncation)}
    said = []
    monkeypatch.setattr("rpt_lightning.training.step.rollout_parts.rank_zero_info", said.append)
    watch, _, _, error = run(make_run, 2, WrongLogprobs(SCRIPT), rollout_options=options)
    assert error is None
    assert len(watch.batches) == 2
    assert sum("are not compared" in line for line in said) == 1
    _, _, _, error = run(make_run, 2, StaleAfterFirst(SCRIPT), rollout_options=options)
    assert "compared tensors differ" in str(error)


class Reads(ScriptedEngine):
    """Records which tensors were read back."""

    def _read_weights(self, names):
        self.__dict__.setdefault("reads", []).append(tuple(names))
        return super()._read_weights(names)


def test_each_check_looks_at_the_next_tensors_however_versions_advance(make_run):
    engine = Reads(SCRIPT)
    _, module, _, _ = run(
        make_run,
        20,
        engine,
        module_options={"optimizer_steps_per_batch": 4},
        rollout_options={"check": EngineCheck(verify_sequences=0)},
    )
    assert [event for event in engine.events if event.startswith("update")] == [
        f"update {4 * step}" for step in range(5)
    ]
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
    difference = rollout.parts.sync.check_logprobs(trainer, module, (), temperature=1.0)
    assert len(passes) == 2  # as many as the rank that needs most
    assert difference["sync/logprob_diff_max"] == 0


class OneRareToken(ScriptedEngine):
    """The first token of each first completion is far off, as a rare one in bf16 may be.

    All others are right.
    """

    def _generate(self, requests):
        return [
            [
                Sample(s.token_ids, (s.logprobs[0] - 5.0 * (index == 0), *s.logprobs[1:]))
                for index, s in enumerate(row)
            ]
            for row in super()._generate(requests)
        ]


def warnings_of(monkeypatch):
    said = []
    monkeypatch.setattr(engine_sync, "rank_zero_warn", said.append)
    return said


def test_rare_tokens_that_are_far_off_are_said_once_and_end_nothing(make_run, monkeypatch):
    said, logged = warnings_of(monkeypatch), []
    log = LambdaCallback(on_train_batch_end=lambda trainer, *_: logged.append(dict(trainer.callback_metrics)))
    watch, _, _, error = run(
        make_run,
        2,
        OneRareToken(SCRIPT),
        more=[log],
        rollout_options={"check": EngineCheck(verify_sequences=1000)},
    )
    assert error is None
    assert len(watch.batches) == 2
    assert len(said) == 1
    assert "the log-probs of single tokens differ much" in said[0]
    for metrics, batch in zip(logged, watch.batches, strict=True):
        num_tokens = sum(
            len(completion.token_ids) for group in batch.groups for completion in group.completions
        )
        assert metrics["sync/compared_tokens"] == num_tokens
        assert metrics["sync/logprob_outlier_frac"] == pytest.approx(len(batch.groups) / num_tokens)
        assert metrics["sync/logprob_diff_max"] == pytest.approx(5.0, abs=1e-3)
        assert metrics["sync/logprob_diff_median"] < 8e-5
        assert metrics["sync/closer_looks"] == 0


class OneWrongCompletion(ScriptedEngine):
    """Its log-probs are off by six times the limit of the mean."""

    def _generate(self, requests):
        rows = super()._generate(requests)
        first = rows[0][0]
        self.wrong = Sample(first.token_ids, tuple(logprob - 6e-4 for logprob in first.logprobs))
        rows[0][0] = self.wrong
        return rows


def test_on_a_suspicion_more_is_compared_before_anything_ends(make_run, monkeypatch):
    """Everything that a first look sees is wrong, and so is one in thirty-two of everything else."""
    said, asked, engine = warnings_of(monkeypatch), [], OneWrongCompletion(SCRIPT)

    def worst_first(groups, num, *, seed):
        asked.append(num)
        samples = drawn_completions(groups, 1000, seed=seed)
        return (
            [sample for sample in samples if sample.completion.rollout_logprobs == engine.wrong.logprobs]
            if num == 1
            else samples
        )

    monkeypatch.setattr(engine_sync, "drawn_completions", worst_first)
    watch, _, _, error = run(make_run, 1, engine, rollout_options={"check": EngineCheck(verify_sequences=1)})
    assert error is None
    assert asked == [1, 16]
    assert len(watch.batches) == 1
    assert "Over more tokens both agree with transformers' own" in said[0]


class WrongPolicy(Policy):
    """Ignores part of the model, such as the bias of a head."""

    def forward(self, tree, **options):
        logprobs, entropy = super().forward(tree, **options)
        return logprobs * 1.25, entropy


def test_a_policy_that_computes_wrongly_is_what_the_error_names(make_run):
    begin = LambdaCallback(
        on_train_start=lambda trainer, module: setattr(module.policy, "__class__", WrongPolicy)
    )
    _, _, _, error = run(make_run, 1, ScriptedEngine(SCRIPT), more=[begin])
    assert error.culprit == "policy"
    assert "The policy is wrong" in str(error)
    assert "the engine's differ by" in str(error)


def test_weights_that_are_no_numbers_are_the_folders(make_run):
    def spoil(trainer, module):
        with torch.no_grad():
            module.policy.model.model.norm.weight[3] = torch.nan

    _, _, _, error = run(make_run, 1, ScriptedEngine(SCRIPT), more=[LambdaCallback(on_train_start=spoil)])
    assert error.culprit == "folder"
    assert "1 of its weights hold values that are not finite (model.norm.weight)" in str(error)


def test_a_config_that_was_changed_is_the_folders(make_run, tiny_model_dir, tmp_path):
    """The policy has already read it, and the engine reads it later."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)

    def change(trainer, module):
        module.policy.model_path = str(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 10.0}))

    _, _, _, error = run(make_run, 1, ScriptedEngine(SCRIPT), more=[LambdaCallback(on_train_start=change)])
    assert error.culprit == "folder"
    assert "its config.json was changed after the policy was loaded (rms_norm_eps)" in str(error)


def test_a_head_of_its_own_beside_a_config_that_ties_it_is_the_folders(make_run):
    def untie(trainer, module):
        head = module.policy.model.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach() * 1.5)

    _, _, _, error = run(make_run, 1, ScriptedEngine(SCRIPT), more=[LambdaCallback(on_train_start=untie)])
    assert error.culprit == "folder"
    assert "lm_head.weight and model.embed_tokens.weight are one tensor (tie_word_embeddings)" in str(error)
    assert "compared tensors differ" in str(error)


def test_the_draw_of_what_is_compared_is_the_same_each_time_and_another_with_each_version():
    places = drawn_tokens(100_000, 4096, seed=(0, 7))
    assert places.shape == (4096,)
    assert torch.equal(places, drawn_tokens(100_000, 4096, seed=(0, 7)))
    assert not torch.equal(places, drawn_tokens(100_000, 4096, seed=(0, 8)))
    assert torch.equal(places, places.unique())  # ascending, none twice
    assert int(places[-1]) > 99_000  # late tokens too
    assert torch.equal(drawn_tokens(5, 4096, seed=(0, 7)), torch.arange(5))


class WrongFrom(ScriptedEngine):
    """Computes something else from a version on. With ``stale`` it keeps old weights instead."""

    def __init__(self, version, *, stale=False):
        super().__init__(SCRIPT)
        self.wrong_from, self.stale = version, stale

    def _update_weights(self, weights, version):
        if not self.stale or version < self.wrong_from:
            super()._update_weights(weights, version)
        else:
            list(weights)

    def _generate(self, requests):
        samples = super()._generate(requests)
        if self.stale or self.version < self.wrong_from:
            return samples
        return [
            [Sample(s.token_ids, tuple(logprob * 1.25 for logprob in s.logprobs)) for s in row]
            for row in samples
        ]


@pytest.mark.parametrize("case", ["log-probs", "weights", "reward", "ahead"])
def test_what_ends_a_run_in_a_step_saves_the_step_before_first(make_run, tmp_path, case):
    """The run then resumes from there bit for bit: weights, data, metrics, samples."""
    steps, wrong_at = 4, 2
    ahead = (
        {"rollout_options": {"max_staleness": 1}, "module_options": {"correction": "truncate"}}
        if case == "ahead"
        else {}
    )

    class Fails(SomeAreRight):
        calls = 0

        def group_rewards(self, answered):
            self.calls += 1
            if case == "reward" and self.calls > 8 * wrong_at + 3:
                raise ZeroDivisionError("in the user's own reward")
            return super().group_rewards(answered)

    def make(folder, engine, reward):
        trainer, module, data = make_run(
            steps,
            engine=lambda: engine,
            run_dir=folder,
            callbacks=[StepLog(), RolloutSamples(every_n_steps=1)],
            **ahead,
        )
        for callback in trainer.callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.every_n_steps = 100
            if isinstance(callback, RolloutCallback):
                callback.objective = NextTokenObjective(ContinuationPrompt(), reward)
        return trainer, module, data

    trainer, module, data = make(tmp_path / "whole", ScriptedEngine(SCRIPT), SomeAreRight())
    trainer.fit(module, data)
    engine = ScriptedEngine(SCRIPT) if case == "reward" else WrongFrom(wrong_at, stale=case == "weights")
    trainer, module, data = make(tmp_path / "parts", engine, Fails())
    with pytest.raises(ZeroDivisionError if case == "reward" else SyncError):
        trainer.fit(module, data)
    path = last_checkpoint(tmp_path / "parts")
    assert path.name == f"step-{wrong_at:06d}.ckpt"
    assert torch.load(path, weights_only=True)["TokenTaskDataModule"]["stream"]["index"] == 8 * wrong_at
    trainer, module, data = make(tmp_path / "parts", ScriptedEngine(SCRIPT), SomeAreRight())
    trainer.fit(module, data, ckpt_path=str(path), weights_only=True)
    if case != "ahead":  # in that case it depends on timing what is ready when
        assert differences(traces(tmp_path / "parts"), traces(tmp_path / "whole")) == []
