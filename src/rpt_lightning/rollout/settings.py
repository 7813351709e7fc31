"""Settings of rollouts in groups. Each group is declared here alone and checks its own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from rpt_lightning.flag_bounds import check_number


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled.

    Args:
        temperature: Sampling temperature of training rollouts and of ``evaluation.samples``. Other
            validation answers are greedy.
        top_p: A value below 1 truncates the sampling distribution, which biases importance ratios.
        top_k: A value above 0 truncates the sampling distribution, like top_p.
        min_p: A value above 0 truncates the sampling distribution, like top_p.
        max_completion_tokens: Maximum length of a completion.
        stop_after_first_box: End a completion at the token that completes its first box after the thought,
            instead of letting the policy end it. The paper does not do this (docs/decisions.md). The setting
            also applies to validation.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_completion_tokens: int = 8192
    stop_after_first_box: bool = False

    def __post_init__(self) -> None:
        check_number("rollout.sampling.temperature", self.temperature, least=0)
        check_number("rollout.sampling.top_p", self.top_p, above=0, most=1)
        check_number("rollout.sampling.top_k", self.top_k, least=0)
        check_number("rollout.sampling.min_p", self.min_p, least=0, below=1)
        check_number("rollout.sampling.max_completion_tokens", self.max_completion_tokens, least=1)

    @property
    def truncation(self) -> str:
        """The settings that may truncate the distribution, in words for messages."""
        return f"rollout.sampling.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}"


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """When zero-variance groups are replaced by groups of new tasks (DAPO, arXiv:2503.14476).

    Args:
        from_step: From this step on, groups whose rewards are all equal are replaced by groups of new tasks
            (500 in the paper). None turns this off.
        max_factor: Maximum number of tasks that a step rolls out in total, as a multiple of the step's tasks.
            Zero-variance groups that still remain are kept.
    """

    from_step: int | None = 500
    max_factor: float = 4.0

    def __post_init__(self) -> None:
        check_number(
            "rollout.dynamic_sampling.from_step",
            self.from_step,
            least=0,
            hint=", or null for no dynamic sampling",
        )
        check_number(
            "rollout.dynamic_sampling.max_factor",
            self.max_factor,
            least=1,
            hint=" (1: only the step's own tasks); to turn dynamic sampling off set "
            "--rollout.dynamic_sampling.from_step null",
        )

    def max_extra_tasks(self, *, step: int, tasks_per_step: int) -> int:
        """Return the most tasks that may be drawn beyond a step's own, over all ranks.

        >>> DynamicSampling(from_step=3, max_factor=2.5).max_extra_tasks(step=3, tasks_per_step=8)
        12
        """
        if self.from_step is None or step < self.from_step:
            return 0
        return int((self.max_factor - 1) * tasks_per_step)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tasks are rolled out, given the policy's probability of the true answer (docs/selection.md).

    Before the rollouts of a step, the policy scores each task's true answer without a thought (for next
    tokens, the true token after the bare context), at temperature 1. With the defaults nothing is scored.

    Args:
        min_true_prob: Do not roll out tasks whose true answer has a lower probability than this under the
            policy.
        max_true_prob: Do not roll out tasks whose true answer has a higher probability than this under the
            policy.
        max_draws: Maximum number of tasks that are drawn for each slot of a step, including its first task.
            If none of them is accepted, the slot keeps the task that was drawn last.
        by_kind: Also prefer the kinds of positions whose groups have often had a gradient in this run. A
            kind is a range of the policy's probability of the true answer and a range of its entropy there.
            The probability of accepting a task is proportional to the fraction of its kind's groups that had
            a gradient.
        kind_floor: Lowest probability with which a task of any kind is accepted.
        kind_decay: Factor by which the counts of groups of each kind are multiplied after every step. With a
            smaller factor, earlier steps are forgotten sooner. With 1, they are never forgotten.
    """

    min_true_prob: float = 0.0
    max_true_prob: float = 1.0
    max_draws: int = 8
    by_kind: bool = False
    kind_floor: float = 0.1
    kind_decay: float = 0.9

    def __post_init__(self) -> None:
        check_number("rollout.selection.min_true_prob", self.min_true_prob, least=0, below=1)
        check_number("rollout.selection.max_true_prob", self.max_true_prob, above=0, most=1)
        check_number(
            "rollout.selection.max_draws",
            self.max_draws,
            least=2,
            hint=", since with 1 every task would be kept; for no selection leave "
            "rollout.selection.min_true_prob at 0, max_true_prob at 1 and by_kind false",
        )
        check_number(
            "rollout.selection.kind_floor",
            self.kind_floor,
            above=0,
            most=1,
            hint=", so that no kind starves",
        )
        check_number("rollout.selection.kind_decay", self.kind_decay, above=0, most=1)
        if self.min_true_prob >= self.max_true_prob:
            raise ValueError(
                f"rollout.selection.min_true_prob={self.min_true_prob}: must be below "
                f"rollout.selection.max_true_prob={self.max_true_prob}; 0 and 1 select nothing"
            )

    @property
    def is_on(self) -> bool:
        """Whether the policy scores tasks before they are rolled out."""
        return self.min_true_prob > 0 or self.max_true_prob < 1 or self.by_kind

    def has_in_band(self, true_prob: float) -> bool:
        """Whether a probability of the truth lies in the band, whose ends belong to it.

        >>> [Selection(min_true_prob=0.05, max_true_prob=0.8).has_in_band(p) for p in (0.04, 0.05, 0.8, 0.9)]
        [False, True, True, False]
        """
        return self.min_true_prob <= true_prob <= self.max_true_prob

    def max_extra_tasks(self, num_places: int) -> int:
        """Return the most tasks that may be drawn beyond the first ones of some places, over all ranks.

        >>> Selection(max_draws=4).max_extra_tasks(8)
        24
        """
        return (self.max_draws - 1) * num_places


@dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """How the engine's log-probs are compared with the policy's after each weight sync.

    Args:
        verify_sequences: Number of new completions whose log-probs are compared with the policy's after each
            weight sync. 0 turns the comparison off. If the difference exceeds its limits, 16 times as many
            completions are compared, also with transformers' own log-probs. The run ends if they confirm the
            difference.
        logprob_tolerance: Factor by which the limits of this comparison are multiplied. The limits depend on
            the less precise of the engine's and the policy's dtypes.
    """

    verify_sequences: int = 4
    logprob_tolerance: float = 1.0

    def __post_init__(self) -> None:
        check_number(
            "rollout.check.verify_sequences", self.verify_sequences, least=0, hint="; 0 compares no log-probs"
        )
        check_number(
            "rollout.check.logprob_tolerance",
            self.logprob_tolerance,
            above=0,
            hint=", a factor on limits; verify_sequences 0 turns them off",
        )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a validation generates besides greedy answers.

    Args:
        samples: Number of completions that are sampled at each held-out position in addition to the greedy
            one, at ``sampling.temperature``, for avg@k and pass@k. 0 samples none. Above 0, each
            held-out question gets this many sampled completions instead of a greedy one.
        thought_controls: Also answer at each held-out position after an empty thought, after another
            document's thought, and after filler of the same length. Also answer each held-out question
            without a thought.
    """

    samples: int = 0
    thought_controls: bool = False

    def __post_init__(self) -> None:
        check_number("rollout.evaluation.samples", self.samples, least=0, hint="; 0 draws none")
