"""`rpt evaluate benchmark`: put questions with verifiable answers to any number of policies.

Each question is asked with a thought and without one. Like `rpt evaluate next-token`, this is a validation
that runs for each policy in turn. The engine holds the policy's verified weights, and there is one record
for each question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback

from rpt_lightning.data.modules.answers import AnswerTaskDataModule, answer_tasks, choose
from rpt_lightning.data.sources.benchmarks import benchmark_source
from rpt_lightning.data.sources.questions import QuestionSource, read_all
from rpt_lightning.evaluation.earlier_results import Records, check_against
from rpt_lightning.evaluation.policies import PolicyEvaluation
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
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.records.question_results import QuestionResults, read_question_results
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.settings import Evaluation, Sampling
from rpt_lightning.training.callbacks.answer_results import AnswerResults
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.types import Question

# Imported so that the command line accepts their short names.
from rpt_lightning.data.sources.questions import HuggingFaceQuestions, JsonlQuestions  # isort: skip
from rpt_lightning.rollout.engines.hf_engine import HFEngine  # isort: skip
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine  # isort: skip
from rpt_lightning.objectives.prompts.template import ContinuationPrompt, QuestionPrompt  # isort: skip

PARTS = (HFEngine, VLLMEngine, JsonlQuestions, HuggingFaceQuestions, ContinuationPrompt, QuestionPrompt)
ANSWERS = Records(
    read_file=read_question_results,
    last_of=lambda run: run.last_answers,
    what="answered questions (answers/step-N.jsonl)",
)


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
        prompt: Template of the questions: QuestionPrompt (the policies' chat template) or ContinuationPrompt
            (for base models).
        benchmark: aime24, aime25, math500, mmlu_pro or supergpqa.
        file: A JSONL file with the rows of the benchmark's dataset. It replaces the download from the hub.
        revision: Commit of the dataset on the hub.
        questions: Your own questions instead of a benchmark, e.g. JsonlQuestions.
        against: Earlier answers to the same questions to compare with. Give a file of records
            (answers/step-N.jsonl) or the folder of a run or an evaluation.
        output: Folder to write. It must be new or empty.
        num_questions: Number of questions to draw with the seed. None asks all of them.
        k: Number of completions sampled for each question, for avg@k and pass@k. 0 takes one greedy
            completion.
        temperature: Sampling temperature of the completions that k asks for.
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
    evaluation = PolicyEvaluation(
        policies=policy, output=output, precision=precision, accelerator=accelerator
    )
    evaluation.begin()
    name, source = _questions(benchmark, file, revision, questions)
    objective = QuestionObjective(prompt, AnswerReward())
    asked = choose(read_all(source, flag="benchmark" if benchmark else "questions"), num_questions, seed=seed)

    def parts(module: NTPModule) -> tuple[AnswerTaskDataModule, list[Callback]]:
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
        return data, [rollout, AnswerResults()]

    stages: list[AnswerStage] = []
    if against is not None:
        earlier = ANSWERS.read(against)
        _check_against(earlier, asked, against)
        stages.append(AnswerStage(name=str(against), results=earlier))
    for short_name, folder in evaluation.run(parts):
        stages.append(AnswerStage(name=short_name, results=ANSWERS.read(folder)))
    evaluation.write_summary(
        summary(stages), beside="one record for each question stands beside it, for rpt compare"
    )


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
    before = {question.question_id: question.answer for question in earlier.questions}
    check_against(
        against,
        before,
        {question.question_id: question.answer for question in asked},
        others=f"answers to other questions ({len(before)} of {earlier.benchmark})",
        same_flags="benchmark, --num_questions and --seed as for the earlier answers",
        item="question",
        truth="answer",
    )
