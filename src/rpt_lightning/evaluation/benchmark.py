"""`rpt evaluate benchmark`: put questions with verifiable answers to any number of policies.

Each question is asked with a thought and without one. Like `rpt evaluate next-token`, this is a validation
that runs for each policy in turn. The engine holds the policy's verified weights, and there is one record
for each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rpt_lightning.data.modules.answers import AnswerTaskDataModule, answer_tasks, choose
from rpt_lightning.data.sources.benchmarks import benchmark_source
from rpt_lightning.data.sources.questions import QuestionSource, read_all
from rpt_lightning.evaluation.policies import (
    check_new_output,
    check_policies,
    evaluation_trainer,
    policy_names,
    policy_source,
)
from rpt_lightning.evaluation.run import read_run
from rpt_lightning.evaluation.tables.answers import (
    NOTE,
    AnswerStage,
    answer_table,
    before_after_table,
    category_table,
    differences,
)
from rpt_lightning.objectives.prompts.template import PromptTemplate
from rpt_lightning.objectives.question import QuestionObjective
from rpt_lightning.objectives.rewards.answer import AnswerReward
from rpt_lightning.policy.model import Policy
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.records.question_results import QuestionResults, read_question_results
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.settings import Evaluation, Sampling
from rpt_lightning.training.callbacks.answer_results import AnswerResults
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.library_noise import quieten_libraries
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.types import Question

# Imported so that the command line accepts their short names.
from rpt_lightning.data.sources.questions import HuggingFaceQuestions, JsonlQuestions  # isort: skip
from rpt_lightning.rollout.engines.hf_engine import HFEngine  # isort: skip
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine  # isort: skip
from rpt_lightning.objectives.prompts.template import ContinuationPrompt, QuestionPrompt  # isort: skip

PARTS = (HFEngine, VLLMEngine, JsonlQuestions, HuggingFaceQuestions, ContinuationPrompt, QuestionPrompt)
SUMMARY = "summary.md"


def benchmark(
    policy: list[str],
    *,
    engine: RolloutEngine,
    prompt: PromptTemplate,
    benchmark: str | None = None,
    file: Path | None = None,
    revision: str | None = None,
    questions: QuestionSource | None = None,
    against: Path | None = None,
    output: Path = Path("benchmark"),
    num_questions: int | None = None,
    k: int = 1,
    temperature: float = 0.8,
    max_completion_tokens: int = 12288,
    stop_after_first_box: bool = False,
    direct: bool = True,
    batch_size: int = 256,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accelerator: str = "auto",
    seed: int = 0,
) -> None:
    """Measure each policy's accuracy on a benchmark and compare the last policy with the others.

    Writes ``output/summary.md``. For each policy it also writes a folder with one record for each question,
    which `rpt compare` reads like the folder of a run.

    Args:
        policy: Hugging Face folders (or hub ids), or checkpoints of `rpt fit`.
        engine: The engine that generates, e.g. VLLMEngine or HFEngine.
        prompt: How the policies are asked: QuestionPrompt (their chat template) or ContinuationPrompt (for
            base models).
        benchmark: aime24, aime25, math500, mmlu_pro or supergpqa.
        file: A JSONL file with the rows of the benchmark's dataset. It replaces the download from the hub.
        revision: Commit of the dataset on the hub.
        questions: Your own questions instead of a benchmark, e.g. JsonlQuestions.
        against: Earlier answers to the same questions to compare with. Give a file of records
            (answers/step-N.jsonl) or the folder of a run or an evaluation.
        output: Folder to write. It must be new or empty.
        num_questions: How many questions to draw with the seed. None asks all.
        k: Completions for each question, for avg@k and pass@k. 0 takes one greedy completion.
        temperature: Sampling temperature of those completions.
        max_completion_tokens: Maximum length of a completion. The summary shows how many reached it.
        stop_after_first_box: End a completion after its first box, as in training
            (rollout.sampling.stop_after_first_box).
        direct: Also ask for an answer without a thought.
        batch_size: Questions in one batch. Results do not depend on it.
        precision: Precision of the policy's own forward pass, which is compared with the engine. The engine
            has its own dtype.
        accelerator: Device of the policy: auto, cpu or gpu.
        seed: Seed for the choice of questions and for sampling.
    """
    if k < 0:
        raise ValueError(
            f"--k {k}: give 1 or more completions for each question, or 0 for one greedy completion"
        )
    check_policies(policy)
    quieten_libraries()
    check_new_output(output)
    name, source = _questions(benchmark, file, revision, questions)
    objective = QuestionObjective(prompt, AnswerReward())
    asked = choose(read_all(source, flag="benchmark" if benchmark else "questions"), num_questions, seed=seed)
    stages: list[AnswerStage] = []
    if against is not None:
        earlier = _earlier(against)
        _check_against(earlier, asked, against)
        stages.append(AnswerStage(name=str(against), results=earlier))
    for one, short_name in zip(policy, policy_names(policy), strict=True):
        path, ckpt_path = policy_source(one)
        module = NTPModule(Policy(path))
        data = AnswerTaskDataModule(
            heldout=source,
            num_eval_questions=num_questions,
            eval_batch_size=batch_size,
            seed=seed,
            heldout_name=name,
        )
        longest = max(len(task.context_ids) for task in answer_tasks(asked, TokenBytes(module.tokenizer)))
        rollout = RolloutCallback(
            engine,
            objective,
            max_prompt_tokens=longest + prompt.bind(module.tokenizer).num_overhead_tokens,
            seed=seed,
            sampling=Sampling(
                temperature=temperature,
                max_completion_tokens=max_completion_tokens,
                stop_after_first_box=stop_after_first_box,
            ),
            evaluation=Evaluation(samples=k, thought_controls=direct),
        )
        trainer = evaluation_trainer(
            output / short_name,
            [rollout, AnswerResults()],
            ckpt_path=ckpt_path,
            precision=precision,
            accelerator=accelerator,
        )
        trainer.validate(module, data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
        stages.append(AnswerStage(name=short_name, results=_last(output / short_name)))
    text = summary(stages)
    (output / SUMMARY).write_text(text, encoding="utf-8")
    print(f"\n{text}\n{output / SUMMARY}; one record for each question stands beside it, for rpt compare")


def summary(stages: Sequence[AnswerStage]) -> str:
    """Write all tables and differences in Markdown.

    Raises ValueError if the stages answered different questions.
    """
    parts = [
        answer_table(stages),
        before_after_table(by_start(stages)),
        category_table(stages),
        NOTE,
        "\n".join(differences(stages)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def by_start(stages: Sequence[AnswerStage]) -> list[list[AnswerStage]]:
    """Group the stages by run, each with its starting model first and its checkpoints in order of steps.

    A run is the folder that holds its checkpoints, because all runs of one model carry the same
    ``policy_path``. A run is left out if its start was not asked.
    """
    starts = {_model(stage): stage for stage in stages if stage.results.step == 0}
    runs: dict[tuple[str, str], list[AnswerStage]] = {}
    for stage in stages:
        if stage.results.step > 0 and _model(stage) in starts:
            ckpt_path = stage.results.ckpt_path
            # Answers of a run that validates during training have no checkpoint, only their own name.
            folder = stage.name if ckpt_path is None else str(Path(ckpt_path).resolve().parent)
            runs.setdefault((_model(stage), folder), []).append(stage)
    return [
        [starts[model], *sorted(run, key=lambda stage: stage.results.step)]
        for (model, _), run in runs.items()
    ]


def _model(stage: AnswerStage) -> str:
    """Name the model that a stage's training started from.

    A folder is resolved, so its spelling does not matter. A hub id stays as it is.
    """
    path = Path(stage.results.policy_path)
    return str(path.resolve()) if path.exists() else stage.results.policy_path


def _questions(
    benchmark: str | None, file: Path | None, revision: str | None, questions: QuestionSource | None
) -> tuple[str, QuestionSource]:
    if (benchmark is None) == (questions is None):
        raise ValueError(
            "give either --benchmark (aime24, aime25, math500, mmlu_pro, supergpqa) or --questions, "
            "e.g. --questions JsonlQuestions"
        )
    if questions is not None:
        if file is not None or revision is not None:
            raise ValueError("--file and --revision go with --benchmark; --questions names its own source")
        return str(getattr(questions, "path", None) or getattr(questions, "name", "questions")), questions
    assert benchmark is not None
    if file is not None and revision is not None:
        raise ValueError(
            f"--revision {revision} is a commit on the hub, but --file {file} is read from disk; "
            "give only one of them"
        )
    return benchmark, benchmark_source(benchmark, file=file, revision=revision)


def _check_against(earlier: QuestionResults, asked: Sequence[Question], against: Path) -> None:
    """Check, before any policy spends hours on answers, that the two can be paired.

    Raises ValueError if they cannot.
    """
    before = {question.question_id: question.answer for question in earlier.questions}
    now = {question.question_id: question.answer for question in asked}
    if unpaired := sorted(before.keys() ^ now.keys()):
        raise ValueError(
            f"--against {against}: these are answers to other questions ({len(before)} of "
            f"{earlier.benchmark}) than the {len(now)} asked here, for example {unpaired[0]!r}. "
            "Give the same benchmark, --num_questions and --seed as for the earlier answers"
        )
    for question_id, answer in before.items():
        if answer != now[question_id]:
            raise ValueError(
                f"--against {against}: question {question_id!r} has the answer {answer!r} there, "
                f"but {now[question_id]!r} here"
            )


def _earlier(path: Path) -> QuestionResults:
    return _last(path) if path.is_dir() else read_question_results(path)


def _last(folder: Path) -> QuestionResults:
    results = read_run(folder).last_answers
    if results is None:
        raise ValueError(f"{folder}: holds no records of answered questions (answers/step-N.jsonl)")
    return results
