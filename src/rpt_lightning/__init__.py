"""Reinforcement Pre-Training (arXiv:2506.08007) on Lightning.

The public Python API is what ``__all__`` lists. Each name is imported when it is first used, so that
importing the package loads neither vllm nor litdata nor lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "Policy": "policy.model",
    "RPTModule": "training.module",
    "NTPModule": "training.ntp_module",
    "RolloutCallback": "training.rollout_callback",
    "RunCheckpoint": "training.checkpoint",
    "ShardedStrategy": "training.strategy",
    "TokenTaskDataModule": "data.datamodule",
    "AnswerTaskDataModule": "data.answer_datamodule",
    "CorpusDataModule": "data.corpus_datamodule",
    "TextDataModule": "data.text_datamodule",
    "JsonlSource": "data.corpus",
    "ParquetSource": "data.corpus",
    "TextFilesSource": "data.corpus",
    "prepare": "data.prepare",
    "Objective": "objectives.base",
    "NextTokenObjective": "objectives.next_token",
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
    "HFEngine": "rollout.hf_engine",
    "VLLMEngine": "rollout.vllm_engine",
    "VLLMServerEngine": "rollout.vllm_server_engine",
    "Sampling": "rollout.settings",
    "DynamicSampling": "rollout.settings",
    "EngineCheck": "rollout.settings",
    "Evaluation": "rollout.settings",
    "read_run": "evaluation.run",
    "read_results": "metrics.results",
}

if TYPE_CHECKING:
    from rpt_lightning.data.answer_datamodule import AnswerTaskDataModule
    from rpt_lightning.data.corpus import JsonlSource, ParquetSource, TextFilesSource
    from rpt_lightning.data.corpus_datamodule import CorpusDataModule
    from rpt_lightning.data.datamodule import TokenTaskDataModule
    from rpt_lightning.data.prepare import prepare
    from rpt_lightning.data.text_datamodule import TextDataModule
    from rpt_lightning.evaluation.run import read_run
    from rpt_lightning.metrics.results import read_results
    from rpt_lightning.objectives.base import Objective
    from rpt_lightning.objectives.next_token import NextTokenObjective
    from rpt_lightning.objectives.prompts.template import (
        ChatPrompt,
        ContinuationPrompt,
        PromptTemplate,
        QuestionPrompt,
    )
    from rpt_lightning.objectives.question import QuestionObjective
    from rpt_lightning.objectives.rewards.answer import AnswerReward
    from rpt_lightning.objectives.rewards.next_token import (
        ConditionalDenseReward,
        DenseReward,
        FirstTokenReward,
        PrefixMatchReward,
        Reward,
    )
    from rpt_lightning.policy.model import Policy
    from rpt_lightning.rollout.hf_engine import HFEngine
    from rpt_lightning.rollout.settings import DynamicSampling, EngineCheck, Evaluation, Sampling
    from rpt_lightning.rollout.vllm_engine import VLLMEngine
    from rpt_lightning.rollout.vllm_server_engine import VLLMServerEngine
    from rpt_lightning.training.checkpoint import RunCheckpoint
    from rpt_lightning.training.module import RPTModule
    from rpt_lightning.training.ntp_module import NTPModule
    from rpt_lightning.training.rollout_callback import RolloutCallback
    from rpt_lightning.training.strategy import ShardedStrategy

__all__ = [
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
    "JsonlSource",
    "NTPModule",
    "NextTokenObjective",
    "Objective",
    "ParquetSource",
    "Policy",
    "PrefixMatchReward",
    "PromptTemplate",
    "QuestionObjective",
    "QuestionPrompt",
    "RPTModule",
    "Reward",
    "RolloutCallback",
    "RunCheckpoint",
    "Sampling",
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
