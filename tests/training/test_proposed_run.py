"""A run in which tasks follow from the policy's own completions: what it trains, resumes and refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import flat_weights, quiet_trainer
from test_ranks import Outcome, assert_same_run, run

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.data.prepare.prepare_command import prepare
from rpt_lightning.data.sources.corpus import DocstringSource
from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.masked_span import MaskedSpanObjective
from rpt_lightning.objectives.proposed_span import ProposedSpanObjective
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import DynamicSampling, Sampling, Selection
from rpt_lightning.training.callbacks.logs import RolloutSamples
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import RunCheckpoint, last_checkpoint
from rpt_lightning.training.modules.rpt_module import RPTModule

STEPS = 3


def spans() -> MaskedSpanObjective:
    return MaskedSpanObjective(num_behind=24)


@pytest.fixture(scope="module")
def span_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "spans"
    prepare(
        DocstringSource("unittest"),
        str(folder),
        tokenizer=str(tiny_model_dir),
        proxy=str(tiny_model_dir),
        entropy_threshold=0.5,
        min_context=4,
        max_tokens_per_document=64,
        max_documents=24,
        heldout_documents=4,
        objective=spans(),
        window=256,
        overlap=64,
        precision="32-true",
    )
    return folder


@pytest.fixture(scope="module")
def script(span_dir: Path) -> list[str]:
    """The words that stand once in most paragraphs."""
    folder = TaskFolder(span_dir, "train")
    words: Counter[bytes] = Counter()
    for document in range(len(folder)):
        pieces = [folder.token_bytes[token] for token in folder.token_ids(document)]
        words.update(text for text, places in spans().spans(pieces).items() if len(places) == 1)
    return [f"</think>\\boxed{{{word.decode()}}}" for word, _ in words.most_common(8)]


@pytest.fixture
def make_run(span_dir, script, tiny_model_dir, tmp_path):
    def make(max_steps: int, *, run_dir: Path | None = None, module=None, **rollout: Any) -> Any:
        rollout_options = {
            "group_size": 6,
            "max_prompt_tokens": 320,
            "sampling": Sampling(max_completion_tokens=32),
            "dynamic_sampling": DynamicSampling(from_step=None),
        }
        callback = RolloutCallback(
            ScriptedEngine(script), ProposedSpanObjective(spans()), **(rollout_options | rollout)
        )
        policy = RPTModule(
            Policy(str(tiny_model_dir)),
            lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
            **(module or {}),
        )
        trainer = quiet_trainer(
            run_dir or tmp_path / "run",
            max_steps,
            [callback, RunCheckpoint(every_n_steps=1), RolloutSamples(every_n_steps=1)],
        )
        return trainer, policy, TokenTaskDataModule(str(span_dir), tasks_per_step=3)

    return make


def fit(make_run, max_steps: int, run_dir: Path, ckpt_path=None, **options):
    trainer, module, data = make_run(max_steps, run_dir=run_dir, **options)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.global_step == max_steps
    samples = {path.name: path.read_text() for path in sorted((run_dir / "rollouts").glob("*.jsonl"))}
    return module, samples


def rows_of(text: str) -> tuple[list[dict], list[dict]]:
    """Proposals and answers of a step."""
    rows = [json.loads(line) for line in text.splitlines()]
    return (
        [row for row in rows if row["task_id"].endswith(":paragraph")],
        [row for row in rows if ":span-" in row["task_id"]],
    )


def test_a_step_trains_proposals_and_answers(make_run, tmp_path):
    module, samples = fit(make_run, 2, tmp_path / "run")
    seen = 0
    for text in samples.values():
        proposals, answers = rows_of(text)
        assert len(proposals) == 3 * 6
        assert len(answers) % 6 == 0
        right: dict[tuple[str, str], list[bool]] = {}
        for row in answers:
            place, truth = row["task_id"].split(":span-")[0], "".join(row["truth"])
            assert row["reward"] == float(row["prediction"] == truth)
            right.setdefault((place, truth), []).append(row["prediction"] == truth)
        for row in proposals:
            marks = right.get((row["task_id"].removesuffix(":paragraph"), row["prediction"]), [])
            share = sum(marks) / 6
            assert len(marks) in (0, 6)
            assert row["reward"] == (1 - share if share else 0.0)
        seen += sum(row["reward"] > 0 for row in proposals)
        assert {row["policy_version"] for row in proposals + answers} == {proposals[0]["policy_version"]}
    assert seen > 0
    logged = module.trainer.callback_metrics
    proposals, answers = rows_of(samples[max(samples)])
    assert logged["proposal/written"] == 18
    assert logged["proposal/rewarded"] == sum(row["reward"] > 0 for row in proposals)
    assert logged["proposal/spans"] == len(answers) / 6


@pytest.mark.parametrize(
    "options",
    [
        {"dynamic_sampling": DynamicSampling(from_step=0, max_factor=2.0)},
        {"module": {"optimizer_steps_per_batch": 2, "ntp_weight": 0.1, "micro_batch_tokens": 400}},
    ],
    ids=["with dynamic sampling", "with mini-batches and the trunk"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(make_run, tmp_path, options):
    per_batch = options.get("module", {}).get("optimizer_steps_per_batch", 1)
    steps = STEPS * per_batch
    whole, samples = fit(make_run, steps, tmp_path / "whole", **options)
    fit(make_run, per_batch, tmp_path / "parts", **options)
    checkpoint = str(last_checkpoint(tmp_path / "parts"))
    resumed, resumed_samples = fit(make_run, steps, tmp_path / "parts", checkpoint, **options)
    assert torch.equal(flat_weights(resumed), flat_weights(whole))
    assert resumed_samples == samples
    assert len(set(samples.values())) == STEPS


@pytest.mark.long
def test_two_ranks_make_the_same_run(span_dir, script, tiny_model_dir, tmp_path):
    """Each rank has answers to its own proposals. With 3 tasks one rank has 1 and the other 2."""
    options = {"steps": 4, "tasks_per_step": 3, "proposals": script, "dynamic_sampling_from_step": 1}
    one, two = (
        Outcome(tmp_path / str(ranks), tiny_model_dir)
        for ranks in (1, 2)
        if run(
            tmp_path / str(ranks), tiny_model_dir, span_dir, ranks=ranks,
            strategy="ddp" if ranks > 1 else "auto", **options,
        )
    )  # fmt: skip
    assert_same_run(one, two)
    assert all(row["proposal/spans"] > 0 for row in one.metrics)
    assert any(any(step) for step in one.lives())


def test_held_out_text_is_asked_as_masked_spans(make_run):
    trainer, module, data = make_run(1)
    trainer.limit_val_batches = 1
    data.num_eval_tasks = 6
    trainer.validate(module, data, verbose=False)
    assert len(module.results) == 6
    for row in module.results:
        assert row.truth == row.truth.strip() != ""
        assert row.reasoning_correct == (row.prediction == row.truth)
    assert trainer.callbacks[0].engine.events.count("generate 6 requests") == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_staleness": 1}, "--rollout.max_staleness 1: cannot be combined with ProposedSpanObjective"),
        ({"pilot_size": 2}, "--rollout.pilot_size 2: cannot be combined with"),
        ({"selection": Selection(min_true_prob=0.1)}, "--rollout.selection: cannot be combined with"),
        ({"max_prompt_tokens": 60}, "--rollout.max_prompt_tokens 60: the longest context"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_the_first_step(make_run, options, says):
    trainer, module, data = make_run(1, **options)
    with pytest.raises(ValueError, match=says):
        trainer.fit(module, data)
    assert not any(event.startswith("generate") for event in trainer.callbacks[0].engine.events)
