"""The objectives about sentences through every command, on a tiny random model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_judges import Stub, said
from test_next_segment import boxed

from rpt_lightning.data.store.task_folder import TaskFolder
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.judges import server_judge
from rpt_lightning.objectives.next_segment import NextSegmentObjective, segment_of
from rpt_lightning.objectives.next_sentence import NextSentenceObjective, choice_of
from rpt_lightning.records.results import read_results
from rpt_lightning.records.rollout_samples import read_samples
from rpt_lightning.records.step_log import read_step_log

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def prepare(rpt, model, folder, objective, *flags):
    return rpt(
        "prepare", "--config", CONFIGS / "prepare/debug.yaml", "--objective", objective,
        "--source.package", "unittest", "--output_dir", folder, "--tokenizer", model, "--proxy", model,
        "--heldout_documents", "6", "--max_documents", "60", "--entropy_threshold", "0.0",
        "--heldout_entropy_threshold", "0.0", *flags,
    )  # fmt: skip


def tasks_of(folder: Path, split: str = "train"):
    prepared = TaskFolder(folder, split)
    return [
        prepared.task(number, k)
        for number in range(len(prepared))
        for k in range(prepared.num_positions[number])
    ]


def through_every_command(rpt, model, folder, run, *ask):
    """Fit, validate, evaluate, compare and report. Returns the records of the run's last validation."""
    flags = [
        "--config", CONFIGS / "debug.yaml", "--model.policy.path", model, "--data.task_dir", folder,
        "--data.tasks_per_step", "4", "--data.positions_per_document", "2", "--data.num_eval_tasks", "6",
        "--data.eval_min_entropy", "0.0", "--rollout.max_prompt_tokens", "512",
        "--rollout.group_size", "2",
    ]  # fmt: skip
    names = [name.replace("--rollout.", "--") if str(name).startswith("--") else name for name in ask]
    status, shown = rpt("fit", *flags, *ask, "--trainer.default_root_dir", run, "--trainer.max_steps", "2")
    assert status == 0, shown
    start = run.with_name("start")
    status, shown = rpt("validate", *flags, *ask, "--trainer.default_root_dir", start)
    assert status == 0, shown
    status, shown = rpt(
        "evaluate", "next-token", "--policy", model, "--task_dir", folder, "--num_tasks", "6",
        "--min_entropy", "0.0", "--engine", "HFEngine", "--engine.dtype", "float32", *names, "--k", "0",
        "--max_completion_tokens", "8", "--output", run.with_name("evaluation"), "--against", run,
    )  # fmt: skip
    assert status == 0, shown
    assert "without" in (run.with_name("evaluation") / "summary.md").read_text()
    assert rpt("compare", run, start)[0] == 0
    assert rpt("report", run, "--output", run.with_name("report.html"))[0] == 0
    rows = read_results(run / "validation" / "step-000002.jsonl").positions
    before = read_results(start / "validation" / "step-000000.jsonl").positions
    assert [row.truth for row in before] == [row.truth for row in rows]
    assert all(row.reasoning_correct is not None for row in rows)
    return rows


def test_next_segment_through_every_command(rpt, tiny_model_dir, tmp_path):
    folder, run = tmp_path / "segments", tmp_path / "run"
    status, shown = prepare(rpt, tiny_model_dir, folder, "NextSegmentObjective")
    assert status == 0, shown
    tasks = tasks_of(folder)
    assert len(tasks) > 20
    objective = NextSegmentObjective(middle_share=0.5)
    bound = BoundObjective(objective, TaskFolder(folder, "train").tokenizer)
    for task in tasks:
        segment = segment_of(task)
        # The segment is what stands there, and the policy does not see it.
        following = bound.tokens.join(task.continuation_ids)
        assert segment.text.encode().startswith(following[: len(segment.text.encode())])
        assert bound.is_right(segment.text.encode(), task)
        assert bound.is_right(b" ".join(bound.truth(task)), task)
        assert not bound.is_right(segment.text.strip()[:-1].encode(), task)
        assert task.answerable
        added = objective.context_ids(task, bound.tokens)[len(task.context_ids) :]
        assert len(added) <= objective.num_added_tokens
        shown_behind = bound.tokens.join(added).decode()
        assert shown_behind == (f" ____ {segment.behind[0]}" if objective.asks_middle(task) else "")
    assert {objective.asks_middle(task) for task in tasks} == {False, True}

    # A random model closes such a thought by chance.
    ask = ["--rollout.objective", "NextSegmentObjective", "--rollout.objective.reward", "LogProbGainReward"]
    ask += ["--rollout.objective.prompt", "ContinuationPrompt", "--rollout.objective.prompt.think_close", "e"]
    rows = through_every_command(rpt, tiny_model_dir, folder, run, *ask)
    assert all(row.truth.strip() == row.truth and len(row.truth.split()) >= 3 for row in rows)
    (samples,) = (read_samples(path) for path in sorted((run / "rollouts").glob("*-000001.jsonl")))
    assert len({sample.reward for sample in samples}) > 1  # nats

    # A folder for segments is none for other sizes of sentences.
    status, shown = rpt(
        "fit", "--config", CONFIGS / "debug.yaml", "--model.policy.path", tiny_model_dir,
        "--data.task_dir", folder, *ask, "--rollout.objective.max_tokens", "32",
        "--trainer.default_root_dir", tmp_path / "other",
    )  # fmt: skip
    assert status == 1
    assert (
        "3 words to 64 tokens, but NextSegmentObjective asks about next segment, sentences of 3 words to 32"
        in shown
    )


@pytest.mark.parametrize("from_others", [2, 0])
def test_next_sentence_through_every_command(rpt, tiny_model_dir, tmp_path, from_others):
    folder, run = tmp_path / "sentences", tmp_path / "run"
    own = ["num_candidates", "3", "num_from_others", from_others, "same_document", "any"]
    names = [f"objective.{name}" if index % 2 == 0 else name for index, name in enumerate(own)]
    status, shown = prepare(
        rpt, tiny_model_dir, folder, "NextSentenceObjective",
        *(f"--{name}" if index % 2 == 0 else name for index, name in enumerate(names)),
    )  # fmt: skip
    assert status == 0, shown
    left_out = json.loads((folder / "manifest.json").read_text())["splits"]["train"].get(
        "without_material", 0
    )
    assert (left_out > 0) == ("has no material" in shown)
    tasks, heldout = tasks_of(folder), tasks_of(folder, "heldout")
    for split, some in (("train", tasks), ("heldout", heldout)):
        prepared = TaskFolder(folder, split)
        documents = {
            prepared.document(number)["doc_id"]: " ".join(
                prepared.token_bytes.join(prepared.token_ids(number)).decode(errors="replace").split()
            )
            for number in range(len(prepared))
        }
        for task in some:
            choice = choice_of(task)
            assert len(set(choice.candidates)) == 3
            # The right one stands at the position. As many as were asked for come from other documents.
            following = prepared.token_bytes.join(task.continuation_ids).decode(errors="ignore")
            assert " ".join(following.split()).startswith(choice.candidates[choice.right][:6])
            others = [text for text in choice.candidates if text not in documents[task.doc_id]]
            assert len(others) == from_others
    objective = NextSentenceObjective(num_candidates=3, num_from_others=from_others, same_document="any")
    bound = BoundObjective(objective, TaskFolder(folder, "train").tokenizer)
    for task in tasks:
        added = objective.context_ids(task, bound.tokens)[len(task.context_ids) :]
        assert len(added) <= objective.num_added_tokens
        assert bound.is_right(choice_of(task).letter.encode(), task)

    ask = ["--rollout.objective", "NextSentenceObjective"]
    ask += [f"--rollout.{name}" if index % 2 == 0 else name for index, name in enumerate(names)]
    rows = through_every_command(rpt, tiny_model_dir, folder, run, *ask)
    assert {row.truth for row in rows} <= set("ABC")


@pytest.mark.parametrize(
    ("text", "objective", "message"),
    [
        ("words that go on and on without an end " * 8, "NextSegmentObjective", "asks about next segment"),
        (
            "It rained a lot. " * 12,
            "NextSentenceObjective",
            "has no material for [0-9]+ of the positions that pass",
        ),
    ],
)
def test_a_corpus_without_a_task_is_one_error(rpt, tiny_model_dir, tmp_path, text, objective, message):
    """Documents without sentences, and documents in which nothing else than the truth is said."""
    file, folder = tmp_path / "text.jsonl", tmp_path / "tasks"
    # Documents that differ in what is no sentence.
    lines = [json.dumps({"text": f"{text} {'abcdefgh'[number] * 9} {number}"}) for number in range(8)]
    file.write_text("\n".join(lines))
    status, shown = rpt(
        "prepare", "--config", CONFIGS / "prepare/debug.yaml", "--objective", objective,
        "--source", "JsonlSource", "--source.path", file, "--source.template", "{text}",
        "--output_dir", folder, "--dedup_span", "null",
        "--tokenizer", tiny_model_dir, "--proxy", tiny_model_dir, "--heldout_documents", "2",
        "--entropy_threshold", "0.0", "--heldout_entropy_threshold", "0.0",
    )  # fmt: skip
    assert status == 1
    assert "no position of the heldout documents passes it and the other limits; lower it" in shown
    assert f"or give another --objective than {objective}, which asks about" in shown
    assert re.search(message, shown)
    assert not folder.exists()


def test_a_run_with_a_judge_and_one_whose_judge_is_not_there(rpt, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(server_judge, "RETRY_S", 0.0)
    folder = tmp_path / "segments"
    assert prepare(rpt, tiny_model_dir, folder, "NextSegmentObjective")[0] == 0
    stub = Stub()
    stub.answer = lambda body: (
        200,
        said(f"Score: {int('It is good.' in body['messages'][0]['content'])}"),
        0.0,
    )
    flags = [
        "fit", "--config", CONFIGS / "debug.yaml", "--model.policy.path", tiny_model_dir,
        "--data.task_dir", folder, "--data.tasks_per_step", "4", "--rollout.max_prompt_tokens", "512",
        "--rollout.engine", "ScriptedEngine", "--rollout.sampling.max_completion_tokens", "48",
        "--rollout.engine.completions", json.dumps(boxed("It is good.", "It is bad.")),
        "--rollout.objective", "NextSegmentObjective", "--rollout.objective.reward", "JudgeReward",
        "--rollout.objective.prompt", "ContinuationPrompt",
        "--rollout.objective.reward.judge", "ServerJudge", "--rollout.objective.reward.judge.model", "small",
        "--rollout.objective.reward.judge.url", stub.url, "--trainer.limit_val_batches", "0",
    ]  # fmt: skip
    run = tmp_path / "run"
    status, shown = rpt(*flags, "--trainer.default_root_dir", run, "--trainer.max_steps", "1")
    assert status == 0, shown
    (samples,) = (read_samples(path) for path in sorted((run / "rollouts").glob("*-000001.jsonl")))
    assert {(sample.prediction, sample.reward) for sample in samples} == {
        ("It is good.", 1.0),
        ("It is bad.", 0.0),
    }
    (row,) = read_step_log(run / "steps.jsonl").values()
    # In a group of 4 each of the two predictions is asked about once.
    groups = len({sample.task_id for sample in samples})
    assert groups < row["judge/asked"] <= 2 * groups
    assert (row["judge/asked"], row["judge/unreadable"]) == (len(stub.requests), 0.0)

    stub.server.shutdown()
    stub.server.server_close()
    status, shown = rpt(*flags, "--trainer.default_root_dir", tmp_path / "other")
    assert status == 1
    assert f"rpt: error: --rollout.objective.reward.judge.url {stub.url}: the judge does not answer" in shown
    assert not list((tmp_path / "other" / "checkpoints").glob("*"))
