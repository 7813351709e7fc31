"""A run that was stopped after any step and resumed equals the uninterrupted run bit for bit."""

from __future__ import annotations

import pytest
import torch
from async_run import OBJECTIVE, rollout_of
from small_run import flat_weights

from rpt_lightning.rollout import position_kinds
from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.rollout.settings import DynamicSampling, Selection
from rpt_lightning.training.callbacks.logs import RolloutSamples
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import last_checkpoint

STEPS = 5


def fit(make_run, max_steps, run_dir, *, ckpt_path=None, **options):
    trainer, module, data = make_run(
        max_steps, run_dir=run_dir, callbacks=[RolloutSamples(every_n_steps=1)], **options
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.global_step == max_steps
    samples = {path.name: path.read_text() for path in sorted((run_dir / "rollouts").glob("*.jsonl"))}
    return flat_weights(module), samples


def check_resume(make_run, tmp_path, stop_at, **options):
    weights, samples = fit(make_run, STEPS, tmp_path / "whole", **options)
    fit(make_run, stop_at, tmp_path / "parts", **options)
    resumed, resumed_samples = fit(
        make_run, STEPS, tmp_path / "parts", ckpt_path=str(last_checkpoint(tmp_path / "parts")), **options
    )
    assert torch.equal(resumed, weights)
    assert resumed_samples == samples  # the same tasks, completions and rewards
    assert len(set(samples.values())) == STEPS  # and not the same step repeatedly


@pytest.mark.parametrize("stop_at", range(1, STEPS))
def test_scripted_engine(make_run, tmp_path, stop_at):
    check_resume(make_run, tmp_path, stop_at, module_options={"micro_batch_tokens": 200})


def test_dynamic_sampling(make_run, tmp_path):
    check_resume(
        make_run,
        tmp_path,
        2,
        rollout_options={"dynamic_sampling": DynamicSampling(from_step=0)},
        module_options={"correction": "truncate"},
    )


@pytest.mark.parametrize("max_factor", [None, 2.0], ids=["by itself", "with dynamic sampling"])
def test_selection(make_run, tmp_path, max_factor):
    """About half of the tasks lie in the band: the tiny model's chances are near 1 / 512."""
    sampling = DynamicSampling(from_step=None if max_factor is None else 0, max_factor=max_factor or 1.0)
    rollout_options = {
        "selection": Selection(min_true_prob=0.0019, max_draws=3),
        "dynamic_sampling": sampling,
    }
    check_resume(make_run, tmp_path, 2, rollout_options=rollout_options)


def test_preferred_kinds(make_run, tmp_path, monkeypatch):
    """The tiny model's chances are near 1 / 512, so kinds are divided there."""
    monkeypatch.setattr(position_kinds, "PROB_EDGES", (0.0005, 0.0015, 0.0018, 0.0019, 0.002, 0.0021, 0.003))

    def some_are_right(*args, **kwargs):
        trainer, module, data = make_run(*args, **kwargs)
        rollout_of(trainer).objective = OBJECTIVE
        return trainer, module, data

    options = {
        "rollout_options": {"selection": Selection(by_kind=True, max_draws=3, kind_floor=0.05)},
        "data_options": {"tasks_per_step": 16},
    }
    check_resume(some_are_right, tmp_path, 3, **options)
    path = last_checkpoint(tmp_path / "parts")
    kinds = torch.load(path, weights_only=True)["callbacks"]["RolloutCallback"]["kinds"]
    assert sum(kinds["total"]) > 16
    assert sum(share > 0 for share in kinds["live"]) > 1
    # Without these counts, the steps after a resume select other tasks. So the test above can fail.
    monkeypatch.setattr(RolloutCallback, "load_state_dict", lambda self, state: None)
    fit(some_are_right, 3, tmp_path / "forgets", **options)
    ckpt_path = str(last_checkpoint(tmp_path / "forgets"))
    _, samples = fit(some_are_right, STEPS, tmp_path / "forgets", ckpt_path=ckpt_path, **options)
    assert samples != {
        path.name: path.read_text() for path in sorted((tmp_path / "whole" / "rollouts").glob("*.jsonl"))
    }


def test_transformers_engine(make_run, tmp_path):
    check_resume(make_run, tmp_path, 3, engine=lambda: HFEngine(dtype="float32"))


@pytest.mark.vllm
def test_vllm_engine(make_run, tmp_path):
    check_resume(
        make_run, tmp_path, 2, engine=lambda: VLLMEngine(dtype="float32", kv_cache_gib=0.1, max_num_seqs=16)
    )
