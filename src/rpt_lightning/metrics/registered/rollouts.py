"""Metrics of a step's rollouts and rewards."""

from __future__ import annotations

from rpt_lightning.metrics.metric import Reduction, Section, row

MAX = Reduction.MAX
MEAN_OVER_GROUPS = Reduction.MEAN_OVER_GROUPS
SAME = Reduction.SAME
SUM = Reduction.SUM

SECTION = Section(
    title="Rewards and rollouts",
    columns=("meaning", "unit", "normal", "watch_for"),
    rows=(
        row(
            {"reward/mean": MEAN_OVER_GROUPS},
            meaning="mean reward of the completions",
            unit="0 to 1 with the paper's reward",
            normal="rises slowly (in `make demo-text` from 0.20 to 0.31)",
            watch_for="stays at 0: look at `rollout/boxed_frac`",
        ),
        row(
            {"rollout/boxed_frac": MEAN_OVER_GROUPS},
            meaning="fraction of completions with a boxed prediction",
            unit="fraction",
            normal="near 1 after the cold start (`make demo-text`: 0.99)",
            watch_for="low: there was no cold start, or completions are truncated",
        ),
        row(
            {"rollout/truncated_frac": MEAN_OVER_GROUPS},
            meaning="fraction of completions that reached the token limit; they have no prediction",
            unit="fraction",
            normal="near 0",
            watch_for="above 0.75: the run warns",
        ),
        row(
            {"rollout/length_mean": MEAN_OVER_GROUPS, "rollout/length_max": MAX},
            meaning="mean and maximum length of completions",
            unit="tokens",
            normal="steady, or rising with reasoning models",
            watch_for="the mean falls below a quarter of its value in the first 20 steps: the run warns",
        ),
        row(
            {"rollout/thought_budget": MAX},
            meaning="token budget of the step's completions (only with `rollout.thought_budget`)",
            unit="tokens",
            normal="falls over the steps that `rollout.thought_budget.steps` sets, then stays constant",
        ),
        row(
            {"rollout/over_budget_frac": MEAN_OVER_GROUPS},
            meaning=(
                "fraction of completions that are longer than `rollout/thought_budget` (only with "
                "`rollout.thought_budget`)"
            ),
            unit="fraction",
            normal="falls",
            watch_for="near 1: the budget falls faster than the policy learns to be brief",
        ),
        row(
            {"reward/objective_mean": MEAN_OVER_GROUPS, "reward/length_mean": MEAN_OVER_GROUPS},
            meaning=(
                "the two parts of `reward/mean`: the objective's reward, and the length term (only "
                "with `rollout.thought_budget`)"
            ),
            unit="objective's reward: its own scale; length term: 0 to 1",
            normal="objective's reward: the same as without a budget",
            watch_for=(
                "the length term rises while the objective's reward falls: the length counts too much in "
                "the reward; lower `rollout.thought_budget.weight` or raise `rollout.thought_budget.least`"
            ),
        ),
        row(
            {"proposal/written": SUM, "proposal/rewarded": SUM},
            meaning=(
                "spans that the policy proposed, and those that earned a reward (only with "
                "`ProposedSpanObjective`; the other metrics count proposals and answers together)"
            ),
            unit="completions",
            normal="at least a few are rewarded",
            watch_for="none are rewarded: proposals are invalid, or answers never find them",
        ),
        row(
            {"proposal/spans": SUM, "proposal/never_found": SUM, "proposal/always_found": SUM},
            meaning=(
                "number of different spans that the policy was asked to find, number that no answer "
                "found, and number that all answers found (only with `ProposedSpanObjective`)"
            ),
            unit="groups",
            normal="most spans are found by some answers",
            watch_for=(
                "most are never found: proposals are too hard; most are always found: proposals are too easy"
            ),
        ),
        row(
            {"rollout/live_groups": SUM},
            meaning=(
                "groups whose rewards differ (if `model.truncated` is `mask`, truncated completions are "
                "ignored)"
            ),
            unit="groups",
        ),
        row(
            {"rollout/live_groups_frac": MEAN_OVER_GROUPS},
            meaning=(
                "fraction of groups whose rewards differ (counted as in `rollout/live_groups`); only "
                "these groups have a gradient"
            ),
            unit="fraction",
            normal="well above 0",
            watch_for=(
                "below 0.05: the run warns; raise `rollout.group_size` or change the entropy threshold"
            ),
        ),
        row(
            {"rollout/all_wrong_frac": MEAN_OVER_GROUPS, "rollout/all_right_frac": MEAN_OVER_GROUPS},
            meaning=(
                "fraction of groups in which no completion is right, and fraction in which all are "
                "(counted as in `rollout/live_groups`)"
            ),
            unit="fraction",
            normal="`all_wrong_frac` falls slowly, `all_right_frac` rises slowly",
            watch_for="`all_wrong_frac` near 1: tasks are too hard; `all_right_frac` near 1: too easy",
        ),
        row(
            {"rollout/distinct_predictions": MEAN_OVER_GROUPS},
            meaning="mean number of different predictions in a group, not counting missing ones",
            unit="0 to `rollout.group_size`",
            normal="above 1",
            watch_for="1: no exploration, for example because the temperature is too low",
        ),
        row(
            {"rollout/replaced_groups": SUM},
            meaning="zero-variance groups that dynamic sampling replaced",
            unit="groups",
            normal="0 before `rollout.dynamic_sampling.from_step`",
        ),
        row(
            {"rollout/dead_groups_kept": SUM},
            meaning="zero-variance groups that remained in the step",
            unit="groups",
            normal="all zero-variance groups without dynamic sampling, 0 with it",
            watch_for="above 0 with dynamic sampling: `rollout.dynamic_sampling.max_factor` was reached",
        ),
        row(
            {"selection/drawn": SUM},
            meaning=(
                "tasks that were drawn and scored by the policy before the rollouts (all `selection/` "
                "metrics exist only with `rollout.selection`)"
            ),
            unit="tasks",
        ),
        row(
            {"selection/in_band": SUM},
            meaning=(
                "drawn tasks for which the policy's probability of the true token lies between "
                "`rollout.selection.min_true_prob` and `max_true_prob`"
            ),
            unit="tasks",
        ),
        row(
            {"selection/kept": SUM},
            meaning="tasks that were rolled out, including those that replaced zero-variance groups",
            unit="tasks",
        ),
        row(
            {"selection/kept_outside": SUM},
            meaning=(
                "tasks that were rolled out although they were not selected, because "
                "`rollout.selection.max_draws` was reached"
            ),
            unit="tasks",
            normal="0",
            watch_for="above 0 in most steps: widen the band, or raise `rollout.selection.max_draws`",
        ),
        row(
            {"selection/accepted": SUM},
            meaning=(
                "tasks in the band that were accepted; the chance of each depends on its kind (only with "
                "`rollout.selection.by_kind`)"
            ),
            unit="tasks",
            normal="in the first step equal to `selection/in_band`",
        ),
        row(
            {"selection/best_kind_frac": MAX},
            meaning=(
                "smoothed fraction of groups with a gradient for the best kind of positions, not "
                "counting this step's groups (only with `rollout.selection.by_kind`)"
            ),
            unit="fraction",
            normal="1 in the first step, then above `rollout/live_groups_frac`",
            watch_for=(
                "falls to `rollout/live_groups_frac`: kinds no longer differ, so the preference brings "
                "nothing and only costs draws"
            ),
        ),
        row(
            {"selection/in_band_frac": SAME},
            meaning="`selection/in_band` divided by `selection/drawn`",
            unit="fraction",
            normal="changes slowly, as the policy learns",
            watch_for="falls steadily: the policy has learned this text, or the band no longer suits it",
        ),
        row(
            {"selection/drawn_per_kept": SAME},
            meaning=(
                "`selection/drawn` divided by `selection/kept`; the corpus is used up this many times as "
                "fast as without selection"
            ),
            unit="ratio",
            normal="1 / `selection/in_band_frac`",
        ),
        row(
            {"rollout/pilot_filled_frac": MEAN_OVER_GROUPS},
            meaning=(
                "fraction of groups that were filled up after their pilot (only with `rollout.pilot_size`)"
            ),
            unit="fraction",
            watch_for="near 1: pilots save nothing",
        ),
        row(
            {"rollout/tokens": SUM},
            meaning="sampled tokens",
            unit="tokens",
        ),
        row(
            {"rollout/prefill_tokens": SUM},
            meaning=(
                "prompt tokens that the engine computed, not counting those from its prefix cache; "
                "servers do not report this, so we assume that their caches keep everything"
            ),
            unit="tokens",
        ),
        row(
            {"rollout/prompt_tokens": SUM},
            meaning=(
                "prompt tokens, counting each prompt once per completion (only for vLLM in the "
                "trainer's process)"
            ),
            unit="tokens",
        ),
        row(
            {"rollout/cached_prompt_tokens": SUM},
            meaning=(
                "prompt tokens that came from the prefix cache (only for vLLM in the trainer's process)"
            ),
            unit="tokens",
        ),
        row(
            {"rollout/shareable_prompt_tokens": SUM},
            meaning=(
                "prompt tokens that a cache which keeps everything could have served (only for vLLM "
                "in the trainer's process)"
            ),
            unit="tokens",
        ),
        row(
            {"rollout/cached_prompt_frac": SAME},
            meaning="`rollout/cached_prompt_tokens` divided by `rollout/prompt_tokens`",
            unit="fraction",
            normal=(
                "near (G - 1) / G, where G is `rollout.group_size`; positions of the same document "
                "raise it; the ends of prompts lower it, because they are not cached "
                "(docs/performance.md)"
            ),
        ),
        row(
            {"rollout/cached_shareable_frac": SAME},
            meaning="`rollout/cached_prompt_tokens` divided by `rollout/shareable_prompt_tokens`",
            unit="fraction",
            normal="near 1",
            watch_for=(
                "low: the cache is too small; raise `rollout.engine.gpu_memory_utilization` (GPU) or "
                "`rollout.engine.kv_cache_gib` (CPU)"
            ),
        ),
        row(
            {"rollout/staleness": MEAN_OVER_GROUPS},
            meaning=(
                "optimizer steps between the weights that generated the rollouts and the weights that "
                "train on them (only with `rollout.max_staleness`)"
            ),
            unit="steps",
            normal="1 with `rollout.max_staleness` 1 and one optimizer step per batch",
        ),
        row(
            {"rollout/dropped_groups": SUM},
            meaning=(
                "groups that exceeded `rollout.max_staleness` and were generated again (only with "
                "`rollout.max_staleness`)"
            ),
            unit="groups",
            normal="0",
            watch_for=(
                "above 0: the module takes more optimizer steps per batch than its "
                "`optimizer_steps_per_batch`"
            ),
        ),
        row(
            {"answers/quoted": SUM},
            meaning=(
                "answers that repeat an expression of the question whose value is the true answer; they get "
                "reward 0 (only with `AnswerReward`)"
            ),
            unit="answers",
            normal="few",
            watch_for="many: the policy has learned to copy",
        ),
        row(
            {"answers/unreadable": SUM},
            meaning="answers that Math-Verify could not read (only with `AnswerReward`)",
            unit="answers",
            normal="few",
            watch_for="many: the policy does not write mathematics in its box",
        ),
        row(
            {"answers/timeouts": SUM},
            meaning=(
                "answers whose check against the true answer took longer than `AnswerReward.cpu_limit_s` "
                "(only with `AnswerReward`)"
            ),
            unit="answers",
            normal="0 or few",
        ),
        row(
            {"answers/check_errors": SUM},
            meaning="answers whose check ended with an error (only with `AnswerReward`)",
            unit="answers",
            normal="0 or few",
        ),
        row(
            {"judge/asked": SUM},
            meaning=(
                "predictions that the judge was asked about since the last step (only with `JudgeReward`)"
            ),
            unit="predictions",
        ),
        row(
            {"judge/unreadable": SUM},
            meaning=(
                "replies of the judge without a verdict (only with `JudgeReward`); two in a row stop the run"
            ),
            unit="replies",
            normal="few",
            watch_for="many: the judge does not follow instructions, or its replies are truncated",
        ),
    ),
)
