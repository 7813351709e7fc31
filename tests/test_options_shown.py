"""Every public option is shown somewhere a user reads: a config, the README, docs/ or scripts/.

An option counts as shown
- as a key of its section in a config (`rollout: {top_p: 0.9}`), also if the line is commented out: then as
  `# key: value  # half a sentence`, with exactly one space after the first `#`. tests/test_configs.py builds
  the configs with these lines as well.
- as a flag or a dotted name (`--rollout.sampling.top_p`, `rollout.sampling.top_p`) in text.
- for `rpt prepare`, `rpt evaluate` and the other tools, as a flag below a heading, or in a file, that names
  the tool.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule

from commented_options import uncommented
from rpt_lightning.cli import command as cli
from rpt_lightning.cli import run as lightning_cli
from rpt_lightning.cli.plan import PlanOptions
from rpt_lightning.cli.serve import ServeSettings
from rpt_lightning.data.modules.tiers import Tiers
from rpt_lightning.data.modules.worked_examples import Phase
from rpt_lightning.data.sources.corpus import CorpusSource
from rpt_lightning.data.sources.questions import QuestionFields, QuestionSource
from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.judges.segment_judge import SegmentJudge
from rpt_lightning.objectives.prompts.template import PromptTemplate
from rpt_lightning.objectives.rewards import answer  # noqa: F401  (defines a reward)
from rpt_lightning.objectives.rewards.next_token import Reward
from rpt_lightning.objectives.rewards.segment import SegmentReward
from rpt_lightning.objectives.thought_budget import ThoughtBudget
from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.model import Policy
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.settings import DynamicSampling, EngineCheck, Evaluation, Sampling, Selection
from rpt_lightning.rollout.weight_sync.transport import WeightTransport
from rpt_lightning.training.modules.policy_module import PolicyModule

ROOT = Path(__file__).resolve().parents[1]
# Where each kind of part stands in a configuration. The leaves of an abstract class share its places.
PLACES: dict[type, set[str]] = {
    PolicyModule: {"model"},
    Policy: {"policy"},
    Adapter: {"adapter"},
    LightningDataModule: {"data", "traces", "text"},
    Phase: {"phases"},
    Tiers: {"tiers"},
    ThoughtBudget: {"thought_budget"},
    CorpusSource: {"source"},
    QuestionSource: {"train", "heldout", "questions"},
    QuestionFields: {"fields"},
    RolloutEngine: {"engine"},
    WeightTransport: {"transport"},
    Objective: {"objective"},
    PromptTemplate: {"prompt"},
    Reward: {"reward"},
    SegmentReward: {"reward"},
    SegmentJudge: {"judge"},
    lightning_cli.ShardedStrategy: {"strategy"},
    lightning_cli.RolloutCallback: {"rollout"},
    Sampling: {"sampling"},
    DynamicSampling: {"dynamic_sampling"},
    Selection: {"selection"},
    EngineCheck: {"check"},
    Evaluation: {"evaluation"},
    lightning_cli.RunCheckpoint: {"checkpoint"},
    lightning_cli.StopRun: {"stop"},
    lightning_cli.RankWatch: {"ranks"},
    lightning_cli.RolloutSamples: {"samples"},
    lightning_cli.Health: {"health"},
    lightning_cli.Budget: {"budget"},
    lightning_cli.MachineStats: {"machine"},
    PlanOptions: {"plan"},
    ServeSettings: {"serve"},
}
# Not for users to set: the command line links it to seed_everything.
LINKED = {("RolloutCallback", "seed")}
# Serve the tests alone.
FOR_TESTS = {"ScriptedEngine"}
FLAG = re.compile(r"--(?:\w+\.)*?(?:(\w+)\.)?([a-z]\w*)\b(?!\.)")
DOTTED = re.compile(r"\b([A-Za-z]\w*)\.(?=([a-z]\w*))")


def leaves(base: type) -> Iterator[type]:
    """The class itself if nothing in this package is derived from it, else the leaves below it."""
    derived = [cls for cls in base.__subclasses__() if cls.__module__.startswith("rpt_lightning.")]
    for cls in derived:
        yield from leaves(cls)
    if not derived and base.__module__.startswith("rpt_lightning."):
        yield base


def parameters(cls: type) -> set[str]:
    """Names of the parameters, with those of the parent where `**kwargs` passes them on."""
    names: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("rpt_lightning.") or "__init__" not in vars(base):
            continue
        signature = inspect.signature(base.__init__).parameters.values()
        kinds = {parameter.kind for parameter in signature}
        names |= {p.name for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return names


def options() -> Iterator[tuple[str, str, set[str]]]:
    """Owner, name and places of every option."""
    for base, places in PLACES.items():
        for cls in leaves(base):
            if cls.__name__ in FOR_TESTS:
                continue
            for name in sorted(parameters(cls)):
                if (cls.__name__, name) not in LINKED:
                    yield cls.__name__, name, places | {cls.__name__}
    for tool, module in cli._MODULES.items():
        function = getattr(importlib.import_module(module), tool.split()[-1].replace("-", "_"))
        for name in inspect.signature(function).parameters:
            if name != "runs":  # words, not a flag
                yield f"rpt {tool}", name, {tool}


def keys(node: Any, place: str) -> Iterator[tuple[str, str]]:
    """Each key of a config with the section that it belongs to."""
    if isinstance(node, list):
        for part in node:
            yield from keys(part, place)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "init_args":
                yield from keys(value, place)
            else:
                yield place, key
                yield from keys(value, key)


def tools_named(text: str) -> set[str]:
    """The tools that a text calls, in a command or in a list of arguments."""
    return {
        tool
        for tool in cli._MODULES
        if re.search(rf"\brpt {tool}\b", text) or f'"{tool.replace(" ", chr(34) + ", " + chr(34))}"' in text
    }


def shown() -> set[tuple[str, str]]:
    """Every option that is shown, as place and name."""
    found: set[tuple[str, str]] = set()
    for file in (ROOT / "configs").rglob("*.yaml"):
        config = yaml.safe_load(uncommented(file.read_text()))
        found |= set(keys(config, "prepare" if file.parent.name == "prepare" else ""))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    programs = [ROOT / "Makefile", *(path for path in (ROOT / "scripts").rglob("*") if path.is_file())]
    for file in [*pages, *programs, *(ROOT / "configs").rglob("*.yaml")]:
        if "__pycache__" in file.parts:
            continue
        text = file.read_text()
        for part in re.split(r"^#+ ", text, flags=re.MULTILINE) if file in pages else [text]:
            for place, name in FLAG.findall(part):
                found |= {(place, name)} if place else {(tool, name) for tool in tools_named(part)}
            if file in pages:
                found |= set(DOTTED.findall(part))
    return found


def test_every_option_is_shown() -> None:
    places_shown = shown()
    hidden: dict[str, list[str]] = {}
    for owner, name, places in options():
        if not any((place, name) in places_shown for place in places):
            hidden.setdefault(owner, []).append(name)
    assert not hidden, f"no config, page or script shows these options: {hidden}"


def test_the_options_of_every_kind_of_part_are_found() -> None:
    """Otherwise the test above could pass because it looked at nothing."""
    found = {(owner, name) for owner, name, _ in options()}
    assert found >= {
        ("RPTModule", "gradient_clip"),  # of its parent
        ("NTPModule", "gradient_clip"),  # of its parent, without an __init__ of its own
        ("TextDataModule", "documents_per_step"),
        ("Cups", "noise"),
        ("VLLMServerEngine", "urls"),
        ("NCCLTransport", "timeout_s"),
        ("AnswerReward", "num_workers"),
        ("ShardedStrategy", "gather_bf16"),
        ("ServeSettings", "restart"),
        ("DynamicSampling", "from_step"),
        ("rpt evaluate benchmark", "k"),
    }


def test_a_commented_out_option_is_read_and_other_comments_are_not() -> None:
    text = "# Hardware: a GPU\nrollout:\n  # top_p: 1.0  # all\n  # Both bounds: as below\n  top_k: 0\n"
    assert yaml.safe_load(uncommented(text)) == {"rollout": {"top_p": 1.0, "top_k": 0}}
