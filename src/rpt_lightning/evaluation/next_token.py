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
from rpt_lightning.evaluation.earlier_results import Records, check_against
from rpt_lightning.evaluation.policies import PolicyEvaluation
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
from rpt_lightning.objectives.thought_budget import NO_BUDGET, WORDING, ThoughtBudget
from rpt_lightning.records.results import Results, read_results
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.settings import Evaluation, Sampling
from rpt_lightning.training.callbacks.logs import ValidationResults
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.types import Task

# Imported so that the command line accepts their short names.
from rpt_lightning.rollout.engines.hf_engine import HFEngine  # isort: skip
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine  # isort: skip

PARTS = (HFEngine, VLLMEngine)
POSITIONS = Records(
    read_file=read_results,
    last_of=lambda run: run.last_validation,
    what="held-out positions (validation/step-N.jsonl)",
)


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
    budget: int | None = None,
    budget_wording: str = WORDING,
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
            needs either this or an objective.
        objective: An objective other than next-token reasoning, e.g. a class of your own, with its prompt.
        against: Earlier results at the same positions to compare with. Give a file of records
            (validation/step-N.jsonl) or the folder of a run or an evaluation.
        output: Folder to write. It must be new or empty.
        num_tasks: Number of held-out positions.
        min_entropy: Use only positions whose proxy entropy exceeds this value, in nats.
        max_context_tokens: Cut longer contexts on the left.
        max_completion_tokens: Maximum length of a completion.
        stop_after_first_box: End a completion after its first box, as in training
            (rollout.sampling.stop_after_first_box).
        budget: Number of tokens that prompts allow for a completion. Set it for a policy that was trained
            with such prompts (rollout.thought_budget). With None, prompts state no number.
        budget_wording: How prompts state the budget, as in training (rollout.thought_budget.wording).
        k: Number of answers sampled at each position for avg@k and pass@k, besides the greedy one. 0 samples
            none.
        temperature: Sampling temperature of the answers that k asks for.
        thought_controls: Also answer after an empty thought, after another document's thought, and after
            filler of the same length.
        batch_size: Positions in one batch. Only the results after another document's thought depend on it.
        precision: Precision of the policy's own forward pass. The engine has its own dtype.
        accelerator: Device of the policy: auto, cpu or gpu.
        seed: Seed for the choice of positions and for sampling.
    """
    evaluation = PolicyEvaluation(
        policies=policy, output=output, precision=precision, accelerator=accelerator
    )
    _check(engine, prompt, objective)
    evaluation.begin()
    asked = (
        NextTokenObjective(prompt or ContinuationPrompt(), PrefixMatchReward())
        if objective is None
        else objective
    )
    thought_budget = NO_BUDGET
    if budget is not None:
        thought_budget = ThoughtBudget(initial=budget, steps=1, decay=1.0, wording=budget_wording)
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

    def parts(module: NTPModule) -> tuple[TokenTaskDataModule, list[Callback]]:
        data = make_data()
        if engine is None:
            return data, [RolloutCallback(None, asked, thought_budget=thought_budget), ValidationResults()]
        data.setup("validate")
        rollout = RolloutCallback(
            engine,
            asked,
            max_prompt_tokens=data.context_limit("heldout").tokens
            + asked.bind(module.tokenizer, thought_budget).num_overhead_tokens,
            seed=seed,
            sampling=Sampling(
                temperature=temperature,
                max_completion_tokens=max_completion_tokens,
                stop_after_first_box=stop_after_first_box,
            ),
            evaluation=Evaluation(samples=k, thought_controls=thought_controls),
            thought_budget=thought_budget,
        )
        return data, [rollout, ValidationResults()]

    stages: list[Stage] = []
    if against is not None:
        earlier = POSITIONS.read(against)
        data = make_data()
        data.setup("validate")
        data.use_objective(asked)
        _check_against(earlier, data.eval_tasks(), asked, against)
        stages.append(Stage(name=str(against), results=earlier))
    for name, folder in evaluation.run(parts):
        stages.append(Stage(name=name, results=POSITIONS.read(folder)))
    evaluation.write_summary(
        summary(stages),
        beside="one record for each position stands beside it, for rpt compare and rpt report",
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
    before = {position.task_id: position.truth for position in earlier.positions}
    check_against(
        against,
        before,
        {task.task_id: b"".join(objective.truth(task)).decode(errors="replace") for task in tasks},
        others=f"results at other positions ({len(before)})",
        same_flags="--task_dir, --num_tasks, --min_entropy and --seed as for the earlier results",
        item="position",
        truth="truth",
    )
