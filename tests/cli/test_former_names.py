"""Configurations of earlier versions still work, and say what changed."""

from __future__ import annotations

from importlib import import_module

import pytest
import yaml

from rpt_lightning.cli import former_names
from rpt_lightning.cli.former_names import translated, translated_flags

PROMPT = {"class_path": "rpt_lightning.tasks.prompt.QuestionPrompt"}


@pytest.mark.parametrize(
    ("reward", "objective"),
    [
        ("rpt_lightning.tasks.reward.DenseReward", "rpt_lightning.NextTokenObjective"),
        (
            "rpt_lightning.tasks.answer_reward.AnswerReward",
            "rpt_lightning.QuestionObjective",
        ),
    ],
)
def test_the_objective_follows_from_its_reward(reward, objective):
    former = {
        "class_path": "rpt_lightning.tasks.objective.Objective",
        "init_args": {"prompt": PROMPT, "reward": {"class_path": reward}},
    }
    with pytest.warns(UserWarning, match="the old name is accepted in this release only"):
        now = translated({"rollout": [{"objective": former}]})["rollout"][0]["objective"]
    assert now["class_path"] == objective
    assert now["init_args"]["prompt"]["class_path"] == (
        "rpt_lightning.objectives.prompts.template.QuestionPrompt"
    )


@pytest.mark.parametrize(("before", "now"), sorted(former_names._MODULES.items()))
def test_every_moved_module_is_where_the_table_says(before, now):
    module = import_module(f"rpt_lightning.{now}")
    name = next(
        name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
    )
    with pytest.warns(UserWarning, match="is now"):
        assert translated({"class_path": f"rpt_lightning.{before}.{name}"}) == {
            "class_path": f"rpt_lightning.{now}.{name}"
        }


def class_names(value):
    """Leave only the name of each class path: a public class has two paths."""
    if not isinstance(value, dict):
        return value
    return {
        key: item.rpartition(".")[2] if key == "class_path" else class_names(item)
        for key, item in value.items()
    }


def test_a_configuration_of_an_earlier_run_is_read(rpt, flags, tmp_path):
    status, shown = rpt("fit", *flags, "--print_config")
    assert status == 0, shown
    config = yaml.safe_load(shown)
    assert config["rollout"]["objective"]["class_path"].endswith(".NextTokenObjective")
    former = shown
    for now, before in {
        "rpt_lightning.NextTokenObjective": "rpt_lightning.tasks.objective.Objective",
        "rpt_lightning.ContinuationPrompt": "rpt_lightning.tasks.prompt.ContinuationPrompt",
        "rpt_lightning.PrefixMatchReward": "rpt_lightning.tasks.reward.PrefixMatchReward",
    }.items():
        assert now in former
        former = former.replace(now, before)
    (tmp_path / "config.yaml").write_text(former)
    with pytest.warns(UserWarning, match="is now rpt_lightning.NextTokenObjective"):
        status, shown = rpt("fit", "--config", tmp_path / "config.yaml", "--print_config")
    assert status == 0, shown
    again = yaml.safe_load(shown[shown.index("seed_everything") :])
    assert class_names(again["rollout"]) == class_names(config["rollout"])


FORMER_SETTINGS = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "max_completion_tokens": 12,
    "stop_after_first_box": True,
    "dynamic_sampling_from_step": None,
    "dynamic_sampling_max_factor": 2.5,
    "verify_sequences": 0,
    "logprob_tolerance": 1.5,
    "eval_samples": 3,
    "thought_controls": False,
}
TODAY = {
    "sampling": {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "max_completion_tokens": 12,
        "stop_after_first_box": True,
    },
    "dynamic_sampling": {"from_step": None, "max_factor": 2.5},
    "check": {"verify_sequences": 0, "logprob_tolerance": 1.5},
    "evaluation": {"samples": 3, "thought_controls": False},
}


def test_settings_of_rollouts_move_into_their_groups(rpt, flags, tmp_path):
    """In a file and as flags. Both reach every option, or `rpt fit` would not know it."""
    (tmp_path / "former.yaml").write_text(yaml.safe_dump({"rollout": FORMER_SETTINGS}))
    ways = {
        "rollout.": ["--config", tmp_path / "former.yaml"],
        "--rollout.": [
            f"--rollout.{name}={'null' if value is None else value}"
            for name, value in FORMER_SETTINGS.items()
        ],
    }
    for prefix, former in ways.items():
        with pytest.warns(UserWarning, match="accepted in this release only") as warned:
            status, shown = rpt("fit", *flags, *former, "--print_config")
        assert status == 0, shown
        said = {str(warning.message).split(" ")[0] for warning in warned}
        assert said >= {prefix + name for name in FORMER_SETTINGS}
        found = yaml.safe_load(shown[shown.index("seed_everything") :])["rollout"]
        assert {group: found[group] for group in TODAY} == TODAY


def test_other_words_of_a_command_line_stay():
    words = ["fit", "--rollout.seed", "3", "--rollout.sampling.top_p", "0.5", "--temperature", "1"]
    assert translated_flags(words) == words
    with pytest.warns(UserWarning, match=r"--rollout\.eval_samples is now --rollout\.evaluation\.samples;"):
        assert translated_flags(["--rollout.eval_samples", "2"]) == ["--rollout.evaluation.samples", "2"]


def test_a_setting_under_both_its_names_is_refused():
    both = {"rollout": {"temperature": 1.0, "sampling": {"temperature": 0.8}}}
    with pytest.raises(ValueError, match=r"rollout\.temperature=1\.0: .* remove rollout\.temperature"):
        translated(both)
