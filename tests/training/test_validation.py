"""Held-out accuracy: against plain transformers logits, for any reward, the right weights, and all ranks."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from small_run import quiet_trainer
from transformers import AutoModelForCausalLM

from rpt_lightning.data.modules.base import EvalLoader
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import DenseReward, FirstTokenReward, PrefixMatchReward
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import Evaluation
from rpt_lightning.training.callbacks.logs import ValidationResults
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import last_checkpoint
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.training.validation.position_records import position_result, unique_results
from rpt_lightning.types import TokenTask

NEXT_TOKEN = BoundObjective(NextTokenObjective(ContinuationPrompt(), PrefixMatchReward()), None)


def test_what_the_corpus_knows_is_in_the_record():
    task = task_at("d", (40, 41, 42), 2)
    measured = {"ntp_correct": True, "ntp_logprob": -0.5, "context_tokens": 2, "answer": None}
    assert position_result(replace(task, fields={"depth": 3}), NEXT_TOKEN, **measured).fields == {"depth": 3}
    assert position_result(task, NEXT_TOKEN, **measured).fields is None


class Heldout(LightningDataModule):
    """Serves the given batches of tasks."""

    def __init__(self, *batches):
        super().__init__()
        self.loader = EvalLoader((), batch_size=1, rank=0, num_ranks=1)
        self.loader.shares = [tuple(batch) for batch in batches]

    def val_dataloader(self):
        return self.loader

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def task_at(doc, ids, position, entropy=1.2):
    return TokenTask(
        task_id=f"{doc}:{position}", doc_id=doc, position=position, context_ids=tuple(ids[:position]),
        continuation_ids=tuple(ids[position:]), continuation=(b"x",) * (len(ids) - position),
        entropy=entropy, true_prob=0.1, true_rank=3, answerable=True,
    )  # fmt: skip


def validate(model_dir, tmp_path, *batches, callbacks=(), **options):
    module = NTPModule(Policy(str(model_dir)), **options)
    trainer = quiet_trainer(tmp_path, 1, list(callbacks), limit_val_batches=1.0, enable_checkpointing=False)
    trainer.validate(module, Heldout(*batches), verbose=False)
    return module, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.fixture(scope="module")
def documents(tiny_model_dir):
    """Three documents whose even tokens are those that the model predicts.

    They come with the model's log-probs [L - 1, V], in which row p - 1 scores position p.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    out = {}
    generator = torch.Generator().manual_seed(0)
    for doc in "abc":
        ids = [int(torch.randint(512, (), generator=generator))]
        while len(ids) < 14:
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(best if len(ids) % 2 == 0 else int(torch.randint(512, (), generator=generator)))
        with torch.no_grad():
            out[doc] = ids, model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return out


@pytest.mark.parametrize("micro_batch_tokens", [8, 1000])
def test_scores_are_those_of_plain_logits(tiny_model_dir, tmp_path, documents, micro_batch_tokens):
    tasks = [
        task_at(doc, ids, position) for doc, (ids, _) in documents.items() for position in (9, 2, 1, 5, 12, 4)
    ]
    module, metrics = validate(
        tiny_model_dir, tmp_path, tasks[:7], tasks[7:], micro_batch_tokens=micro_batch_tokens
    )
    assert [row.task_id for row in module.results] == [task.task_id for task in tasks]
    expected = []
    for row, task in zip(module.results, tasks, strict=True):
        ids, logprobs = documents[task.doc_id]
        scores = logprobs[task.position - 1]
        assert row.ntp_logprob == pytest.approx(scores[ids[task.position]].item(), abs=2e-4)
        assert row.ntp_correct == (int(scores.argmax()) == ids[task.position])
        expected.append(scores[ids[task.position]].item())
    assert {row.ntp_correct for row in module.results if row.position % 2 == 0} == {True}
    assert {row.ntp_correct for row in module.results if row.position % 2} == {False}
    assert metrics["val/ntp/loss"] == pytest.approx(-sum(expected) / len(expected), abs=1e-4)
    assert metrics["val/ntp/all/accuracy"] == 0.5
    assert not any(name.startswith("val/reasoning") for name in metrics)


def test_an_empty_batch_adds_nothing(tiny_model_dir, tmp_path, documents):
    ids, _ = documents["a"]
    tasks = [task_at("a", ids, position) for position in (1, 2, 4)]
    module, metrics = validate(tiny_model_dir, tmp_path, tasks, [])
    assert len(module.results) == metrics["val/ntp/all/num_positions"] == 3
    module, metrics = validate(tiny_model_dir, tmp_path, [])
    assert module.results == []
    assert metrics == {}


def test_a_position_that_two_ranks_measured_counts_once(tiny_model_dir, tmp_path, documents):
    ids, _ = documents["a"]
    mine = validate(tiny_model_dir, tmp_path, [task_at("a", ids, position) for position in (1, 2)])[0].results
    theirs = [mine[1], replace(mine[0], task_id="b:7", doc_id="b")]
    assert [row.task_id for row in unique_results([*mine, *theirs])] == ["a:1", "a:2", "b:7"]


@pytest.mark.parametrize("reward", [DenseReward(), FirstTokenReward()])
def test_accuracy_does_not_depend_on_the_reward(make_run, tiny_task_dir, reward):
    options = {
        "data_options": {"num_eval_tasks": 48, "eval_batch_size": 24},
        "rollout_options": {"evaluation": Evaluation(thought_controls=True)},
        "limit_val_batches": 1.0,
    }
    _, _, data = make_run(1, **options)
    data.setup("validate")
    (first, _), *_ = Counter(task.continuation[0] for task in data.eval_tasks()).most_common(1)
    # Often right, and often right only in the first token, which both rewards accept.
    script = [f"?</think>\\boxed{{{first.decode()}{more}}}" for more in ("", "@@")]
    results = []
    for objective_reward in (PrefixMatchReward(), reward):
        trainer, module, data = make_run(1, engine=lambda: ScriptedEngine(script), **options)
        (rollout,) = (callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))
        rollout.objective = NextTokenObjective(ContinuationPrompt(), objective_reward)
        trainer.validate(module, data, verbose=False)
        results.append(module.results)
    assert results[0] == results[1]
    assert {row.reasoning_correct for row in results[0] if row.truth.startswith(first.decode())} == {
        True,
        False,
    }
    assert all(row.empty_thought_correct is not None for row in results[0])


def test_a_checkpoint_is_validated_under_its_own_step(make_run, tmp_path, capsys):
    trainer, module, data = make_run(2, run_dir=tmp_path / "run")
    trainer.fit(module, data)
    ckpt = str(last_checkpoint(tmp_path / "run"))
    engine = ScriptedEngine(["?</think>\\boxed{e}"])
    trainer, module, data = make_run(
        2,
        engine=lambda: engine,
        run_dir=tmp_path / "val",
        callbacks=[ValidationResults()],
        data_options={"num_eval_tasks": 4},
        limit_val_batches=1.0,
    )
    capsys.readouterr()
    trainer.validate(module, data, ckpt_path=ckpt, weights_only=True, verbose=False)
    assert [path.name for path in sorted((tmp_path / "val" / "validation").iterdir())] == [
        "step-000002.json",
        "step-000002.jsonl",
    ]
    meta = json.loads((tmp_path / "val" / "validation" / "step-000002.json").read_text())
    assert (meta["step"], meta["ckpt_path"], meta["policy_path"]) == (2, ckpt, module.policy.path)
    text = capsys.readouterr().out
    assert f"held-out accuracy of {ckpt} at step 2:" in text
    assert "unanswerable: ceiling" in text
    assert "update 2" in engine.events
    trainer.validate(module, data, verbose=False)  # the weights of the process, not of a checkpoint
    assert (tmp_path / "val" / "validation" / "step-000000.json").is_file()


def test_the_checkpoint_of_another_model_is_refused_without_its_weights(make_run, tmp_path):
    """A sharded strategy takes "state_dict" out of the checkpoint before the module sees it."""
    trainer, module, data = make_run(1, run_dir=tmp_path / "run")
    module.skipped_steps.in_a_row = 2
    trainer.fit(module, data)
    module.skipped_steps.in_a_row = 2
    saved = {}
    module.on_save_checkpoint(saved)
    module.skipped_steps.in_a_row = 0
    module.on_load_checkpoint(saved)
    assert module.skipped_steps.in_a_row == 2
    shapes = saved["rpt"]["weight_shapes"]
    assert all(type(size) is int for shape in shapes.values() for size in shape)
    shapes["model.norm.weight"] = [7]
    with pytest.raises(ValueError, match="weight shapes differ"):
        module.on_load_checkpoint(saved)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_without_fp32_master_weights_are_refused(make_run, precision):
    trainer, module, data = make_run(1, precision=precision)
    with pytest.raises(ValueError, match=rf"--trainer.precision {precision}.*fp32"):
        trainer.fit(module, data)
