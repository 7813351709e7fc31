"""`rpt evaluate next-token`: held-out next-token accuracy of policies at the same positions.

Each policy answers by reasoning and without it. The command runs the validation of `rpt validate` (policy,
engine, verified weights, records) for each policy in turn. It adds samples and tables that would take too
long for a validation during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.evaluation.policies import (
    check_new_output,
    check_policies,
    evaluation_trainer,
    policy_names,
    policy_source,
)
from rpt_lightning.evaluation.run import read_run
from rpt_lightning.evaluation.tables.breakdown import (
    COST_NOTE,
    cost_table,
    disjoint_table,
    further_comparisons,
    kind_table,
    length_table,
    sampling_table,
)  # fmt: skip
from rpt_lightning.evaluation.tables.by_field import field_tables
from rpt_lightning.evaluation.tables.stages import (
    INTERVAL_NOTE,
    Stage,
    comparison_lines,
    difficulty_table,
    stage_table,
)
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt, PromptTemplate
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.policy.model import Policy
from rpt_lightning.records.results import Results, read_results
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.settings import Evaluation, Sampling
from rpt_lightning.training.callbacks.logs import ValidationResults
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.library_noise import quieten_libraries
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.types import Task

# Imported so that the command line accepts their short names.
from rpt_lightning.rollout.engines.hf_engine import HFEngine  # isort: skip
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine  # isort: skip

PARTS = (HFEngine, VLLMEngine)
SUMMARY = "summary.md"


def next_token(
    policy: list[str],
    *,
    task_dir: str,
    engine: RolloutEngine | None = None,
    prompt: PromptTemplate | None = None,
    objective: Objective | None = None,
    against: Path | None = None,
    output: Path = Path("evaluation"),
    num_tasks: int = 1024,
    min_entropy: float = 0.5,
    max_context_tokens: int | None = None,
    max_completion_tokens: int = 1024,
    stop_after_first_box: bool = False,
    k: int = 8,
    temperature: float = 0.8,
    thought_controls: bool = True,
    batch_size: int = 256,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    accelerator: str = "auto",
    seed: int = 0,
) -> None:
    """Measure next-token accuracy at held-out positions and compare the last policy with the others.

    Writes ``output/summary.md``. For each policy it also writes a folder with one record for each position,
    which `rpt report` and `rpt compare` read like the folder of a run.

    Args:
        policy: Hugging Face folders (or hub ids), or checkpoints of `rpt fit` (a file, or a folder of
            shards). Their tokenizer must be that of the task folder.
        task_dir: Folder that `rpt prepare` made. Its held-out split is used.
        engine: The engine that generates, e.g. VLLMEngine or HFEngine. With None, only next-token prediction
            without reasoning is measured.
        prompt: The template that asks the policies for the next token, e.g. ContinuationPrompt. An engine
            needs it, or an objective.
        objective: Another objective than next-token reasoning, e.g. a class of your own, with its prompt.
        against: Earlier results at the same positions to compare with. Give a file of records
            (validation/step-N.jsonl) or the folder of a run or an evaluation.
        output: Folder to write. It must be new or empty.
        num_tasks: Number of held-out positions.
        min_entropy: Use only positions whose proxy entropy exceeds this value, in nats.
        max_context_tokens: Cut longer contexts on the left.
        max_completion_tokens: Maximum length of a completion.
        stop_after_first_box: End a completion after its first box, as in training
            (rollout.sampling.stop_after_first_box).
        k: Answers sampled at each position for avg@k and pass@k, besides the greedy one. 0 samples none.
        temperature: Sampling temperature of those answers.
        thought_controls: Also answer after an empty thought and after another document's thought.
        batch_size: Positions in one batch. Only the results after another document's thought depend on it.
        precision: Precision of the policy's own forward pass. The engine has its own dtype.
        accelerator: Device of the policy: auto, cpu or gpu.
        seed: Seed for the choice of positions and for sampling.
    """
    check_policies(policy)
    _check(engine, prompt, objective)
    if objective is None:
        objective = NextTokenObjective(prompt or ContinuationPrompt(), PrefixMatchReward())
    quieten_libraries()
    check_new_output(output)
    make_data = partial(
        TokenTaskDataModule,
        task_dir,
        tasks_per_step=1,
        max_context_tokens=max_context_tokens,
        num_eval_tasks=num_tasks,
        eval_min_entropy=min_entropy,
        eval_batch_size=batch_size,
        seed=seed,
    )
    stages: list[Stage] = []
    if against is not None:
        earlier = _earlier(against)
        data = make_data()
        data.setup("validate")
        data.use_objective(objective)
        _check_against(earlier, data.eval_tasks(), objective, against)
        stages.append(Stage(name=str(against), results=earlier))
    for one, name in zip(policy, policy_names(policy), strict=True):
        path, ckpt_path = policy_source(one)
        module = NTPModule(Policy(path))
        data = make_data()
        callbacks: list[Callback] = [RolloutCallback(None, objective), ValidationResults()]
        if engine is not None:
            data.setup("validate")
            rollout = RolloutCallback(
                engine,
                objective,
                max_prompt_tokens=data.context_limit("heldout").tokens
                + objective.bind(module.tokenizer).num_overhead_tokens,
                seed=seed,
                sampling=Sampling(
                    temperature=temperature,
                    max_completion_tokens=max_completion_tokens,
                    stop_after_first_box=stop_after_first_box,
                ),
                evaluation=Evaluation(samples=k, thought_controls=thought_controls),
            )
            callbacks[0] = rollout
        trainer = evaluation_trainer(
            output / name, callbacks, ckpt_path=ckpt_path, precision=precision, accelerator=accelerator
        )
        trainer.validate(module, data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
        stages.append(Stage(name=name, results=_last(output / name)))
    text = summary(stages)
    (output / SUMMARY).write_text(text, encoding="utf-8")
    print(
        f"\n{text}\n{output / SUMMARY}; one record for each position stands beside it, for rpt compare "
        "and rpt report"
    )


def summary(stages: Sequence[Stage]) -> str:
    """Write all tables and differences in Markdown.

    Raises ValueError if the stages have different positions.
    """
    differences = [*comparison_lines(stages), *further_comparisons(stages)]
    parts = [
        stage_table(stages),
        sampling_table(stages),
        difficulty_table(stages),
        disjoint_table(stages),
        kind_table(stages),
        *field_tables(stages),
        *map(length_table, stages),
        cost_table(stages),
        COST_NOTE,
        INTERVAL_NOTE if differences else None,
        "\n".join(differences) or None,
    ]
    return "\n\n".join(part for part in parts if part is not None) + "\n"


def _check(engine: RolloutEngine | None, prompt: PromptTemplate | None, objective: Objective | None) -> None:
    if prompt is not None and objective is not None:
        raise ValueError("--prompt and --objective are both set, but an objective has its own prompt")
    if engine is not None and prompt is None and objective is None:
        raise ValueError(
            "--prompt is not set: give the template that asks the policies to reason, the same as in "
            "training, e.g. --prompt ContinuationPrompt"
        )
    if engine is None and prompt is not None:
        raise ValueError(
            "--prompt asks for reasoning, but --engine is not set: give one, e.g. --engine VLLMEngine"
        )


def _check_against(earlier: Results, tasks: Sequence[Task], objective: Objective, against: Path) -> None:
    """Check, before any policy spends hours on answers, that the two can be paired.

    Raises ValueError if they cannot.
    """
    before = {position.task_id: position.truth for position in earlier.positions}
    now = {task.task_id: b"".join(objective.truth(task)).decode(errors="replace") for task in tasks}
    if unpaired := sorted(before.keys() ^ now.keys()):
        raise ValueError(
            f"--against {against}: these are results at other positions ({len(before)}) than the {len(now)} "
            f"asked here, for example {unpaired[0]!r}. Give the same --task_dir, --num_tasks, --min_entropy "
            "and --seed as for the earlier results"
        )
    for task_id, truth in before.items():
        if truth != now[task_id]:
            raise ValueError(
                f"--against {against}: position {task_id!r} has the truth {truth!r} there, "
                f"but {now[task_id]!r} here"
            )


def _earlier(path: Path) -> Results:
    return _last(path) if path.is_dir() else read_results(path)


def _last(folder: Path) -> Results:
    results = read_run(folder).last_validation
    if results is None:
        raise ValueError(f"{folder}: holds no records of held-out positions (validation/step-N.jsonl)")
    return results
