"""Reinforcement Pre-Training (arXiv:2506.08007) on Lightning.

The public Python API is what ``__all__`` lists. Each name is imported when it is first used, so that
importing the package loads neither vllm nor litdata nor lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "Policy": "policy.model",
    "Adapter": "policy.adapter",
    "RPTModule": "training.modules.rpt_module",
    "NTPModule": "training.modules.ntp_module",
    "RolloutCallback": "training.callbacks.rollout_callback",
    "RunCheckpoint": "training.checkpoint.callback",
    "ShardedStrategy": "training.distributed.strategy",
    "TokenTaskDataModule": "data.modules.token_tasks",
    "AnswerTaskDataModule": "data.modules.answers",
    "CorpusDataModule": "data.modules.corpus",
    "TextDataModule": "data.modules.text",
    "JsonlSource": "data.sources.corpus",
    "ParquetSource": "data.sources.corpus",
    "TextFilesSource": "data.sources.corpus",
    "prepare": "data.prepare.prepare_command",
    "Objective": "objectives.base",
    "NextTokenObjective": "objectives.next_token",
    "InformationGainObjective": "objectives.information_gain",
    "MaskedSpanObjective": "objectives.masked_span",
    "ProposedSpanObjective": "objectives.proposed_span",
    "NextSegmentObjective": "objectives.next_segment",
    "NextSentenceObjective": "objectives.next_sentence",
    "SegmentReward": "objectives.rewards.segment",
    "SegmentJudge": "objectives.judges.segment_judge",
    "QuestionObjective": "objectives.question",
    "PromptTemplate": "objectives.prompts.template",
    "ContinuationPrompt": "objectives.prompts.template",
    "ChatPrompt": "objectives.prompts.template",
    "QuestionPrompt": "objectives.prompts.template",
    "Reward": "objectives.rewards.next_token",
    "PrefixMatchReward": "objectives.rewards.next_token",
    "FirstTokenReward": "objectives.rewards.next_token",
    "DenseReward": "objectives.rewards.next_token",
    "ConditionalDenseReward": "objectives.rewards.next_token",
    "AnswerReward": "objectives.rewards.answer",
    "HFEngine": "rollout.engines.hf_engine",
    "VLLMEngine": "rollout.engines.vllm.vllm_engine",
    "VLLMServerEngine": "rollout.servers.server_engine",
    "Sampling": "rollout.settings",
    "DynamicSampling": "rollout.settings",
    "EngineCheck": "rollout.settings",
    "Evaluation": "rollout.settings",
    "Selection": "rollout.settings",
    "read_run": "evaluation.run_reader",
    "read_results": "records.results",
}

if TYPE_CHECKING:
    from rpt_lightning.data.modules.answers import AnswerTaskDataModule
    from rpt_lightning.data.modules.corpus import CorpusDataModule
    from rpt_lightning.data.modules.text import TextDataModule
    from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
    from rpt_lightning.data.prepare.prepare_command import prepare
    from rpt_lightning.data.sources.corpus import JsonlSource, ParquetSource, TextFilesSource
    from rpt_lightning.evaluation.run_reader import read_run
    from rpt_lightning.objectives.base import Objective
    from rpt_lightning.objectives.information_gain import InformationGainObjective
    from rpt_lightning.objectives.judges.segment_judge import SegmentJudge
    from rpt_lightning.objectives.masked_span import MaskedSpanObjective
    from rpt_lightning.objectives.next_segment import NextSegmentObjective
    from rpt_lightning.objectives.next_sentence import NextSentenceObjective
    from rpt_lightning.objectives.next_token import NextTokenObjective
    from rpt_lightning.objectives.prompts.template import (
        ChatPrompt,
        ContinuationPrompt,
        PromptTemplate,
        QuestionPrompt,
    )
    from rpt_lightning.objectives.proposed_span import ProposedSpanObjective
    from rpt_lightning.objectives.question import QuestionObjective
    from rpt_lightning.objectives.rewards.answer import AnswerReward
    from rpt_lightning.objectives.rewards.next_token import (
        ConditionalDenseReward,
        DenseReward,
        FirstTokenReward,
        PrefixMatchReward,
        Reward,
    )
    from rpt_lightning.objectives.rewards.segment import SegmentReward
    from rpt_lightning.policy.adapter import Adapter
    from rpt_lightning.policy.model import Policy
    from rpt_lightning.records.results import read_results
    from rpt_lightning.rollout.engines.hf_engine import HFEngine
    from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
    from rpt_lightning.rollout.servers.server_engine import VLLMServerEngine
    from rpt_lightning.rollout.settings import DynamicSampling, EngineCheck, Evaluation, Sampling, Selection
    from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
    from rpt_lightning.training.checkpoint.callback import RunCheckpoint
    from rpt_lightning.training.distributed.strategy import ShardedStrategy
    from rpt_lightning.training.modules.ntp_module import NTPModule
    from rpt_lightning.training.modules.rpt_module import RPTModule

__all__ = [
    "Adapter",
    "AnswerReward",
    "AnswerTaskDataModule",
    "ChatPrompt",
    "ConditionalDenseReward",
    "ContinuationPrompt",
    "CorpusDataModule",
    "DenseReward",
    "DynamicSampling",
    "EngineCheck",
    "Evaluation",
    "FirstTokenReward",
    "HFEngine",
    "InformationGainObjective",
    "JsonlSource",
    "MaskedSpanObjective",
    "NTPModule",
    "NextSegmentObjective",
    "NextSentenceObjective",
    "NextTokenObjective",
    "Objective",
    "ParquetSource",
    "Policy",
    "PrefixMatchReward",
    "PromptTemplate",
    "ProposedSpanObjective",
    "QuestionObjective",
    "QuestionPrompt",
    "RPTModule",
    "Reward",
    "RolloutCallback",
    "RunCheckpoint",
    "Sampling",
    "SegmentJudge",
    "SegmentReward",
    "Selection",
    "ShardedStrategy",
    "TextDataModule",
    "TextFilesSource",
    "TokenTaskDataModule",
    "VLLMEngine",
    "VLLMServerEngine",
    "prepare",
    "read_results",
    "read_run",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rpt_lightning' has no attribute {name!r}")
    return getattr(import_module(f"rpt_lightning.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
