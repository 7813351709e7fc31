"""The contract of every rollout engine, and the checks that all engines share.

An engine holds its own copy of the policy's weights under a version number and completes prompts with it. It refuses to generate before the first
update and after an update that failed, so a completion always comes from weights whose version is stamped on it: weights never change while it
generates. It may generate in another thread than the one that updates it, one after the other.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import Self

from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.pretrained.tokenizer import as_in_folder, read_tokenizer
from rpt_lightning.rollout.own_engine import check_samples
from rpt_lightning.rollout.requests import check_requests
from rpt_lightning.rollout.weight_part import split_part
from rpt_lightning.tasks.answer import FirstBox
from rpt_lightning.tasks.token_bytes import TokenBytes
from rpt_lightning.types import Completion, GenerationRequest, PromptTokens, SamplingSettings, TokenIds

EngineDtype = Literal["float32", "bfloat16"]
# Tokens that an engine takes of a model without a limit where nobody says how many, as vLLM does.
DEFAULT_MODEL_LEN = 2048


class EngineLost(RuntimeError):
    """Nothing can be generated any more, and nothing is wrong with the policy or with what was asked: a run may end and go on later."""


class GenerationInterrupted(RuntimeError):
    """``interrupt`` was called: nobody waits for these completions any more."""


class Sample(NamedTuple):
    """What a leaf engine returns for one completion: ids up to and including the stop token, and their log-probs (nats)."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]


class RolloutEngine(ABC):
    """Start it, give it weights, let it generate, close it (or use it as a context manager).

    Leaf engines implement the underscored methods; their flat parameters are those of ``__init__``.
    """

    def __init__(self, dtype: EngineDtype) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._version: int | None = None
        self._max_model_len = 0
        self._weight_shapes: dict[str, torch.Size] = {}
        self._token_bytes: TokenBytes | None = None
        # Plain attributes, since a lock cannot travel to another process with the engine; they guard against a mistake, not a race.
        self._under_way: str | None = None
        self._is_interrupted = False
        self.prompt_tokens: PromptTokens | None = None
        """Of all requests since the start; None where the engine has no prefix cache."""

    @property
    def version(self) -> int | None:
        """The policy version of the weights; None before the first update and after one that failed."""
        return self._version

    @property
    def servers(self) -> tuple[int, int] | None:
        """How many servers can be used, and how often one was lost since the engine was made. None where it has none."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._dtype

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together; 0 before the start."""
        return self._max_model_len

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The Hugging Face names that every update must deliver, a tied head under its own name too; empty while it is not started."""
        return tuple(self._weight_shapes)

    @property
    @abstractmethod
    def description(self) -> str:
        """One line that says what runs."""

    def start(self, model_path: str, *, seed: int, max_model_len: int | None = None) -> None:
        """Builds the model of a Hugging Face folder, without its weights: those come with ``update_weights``.

        Args:
            model_path: Folder (or hub id) of configuration and tokenizer.
            seed: For what the engine draws besides completions (those have their own seeds), such as weights before the first update.
            max_model_len: Tokens of prompt and completion together; None: what the model was made for.
        """
        if self._token_bytes is not None:
            raise RuntimeError(f"{type(self).__name__} is already started; close it first")
        config = AutoConfig.from_pretrained(model_path)
        longest = longest_context(config)
        if max_model_len is not None and not 1 <= max_model_len <= (longest or max_model_len):
            raise ValueError(
                f"max_model_len={max_model_len} must lie between 1 and the {longest or 'unlimited'} positions of {model_path}"
            )
        self._max_model_len = max_model_len or longest or DEFAULT_MODEL_LEN
        with torch.device("meta"):
            skeleton = cast(Any, AutoModelForCausalLM).from_config(config)
        token_bytes = TokenBytes(as_in_folder(read_tokenizer(model_path), where=f"tokenizer of {model_path}"))
        self._is_interrupted = False
        self._start(model_path, seed)
        self._weight_shapes = {
            name: weight.shape for name, weight in skeleton.named_parameters(remove_duplicate=False)
        }
        self._token_bytes = token_bytes

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """``n`` completions for each request, in the order of the requests.

        Completion ``i`` is drawn with the seed ``seed + i``, whatever else is generated beside it. Other batches round differently, though, which
        can turn a near tie: in fp32 hardly ever, in bf16 in a few completions of a hundred tokens.

        Raises:
            RuntimeError: The engine has no weights.
            ValueError: A request that cannot be served; the message names its task.
            GenerationInterrupted: Another thread called ``interrupt``.
            EngineLost: What the engine generates on is gone.
        """
        version = self._version
        if self._token_bytes is None or version is None:
            raise RuntimeError(
                f"{type(self).__name__} has no policy weights (not started, no update yet, or the last one failed): call update_weights first"
            )
        if not requests:
            return []
        check_requests(requests, max_model_len=self.max_model_len)
        with self._alone("generate"):
            samples = self._generate(requests)
        check_samples(type(self).__name__, samples, requests)
        return [
            [self._completion(sample, request.sampling, version) for sample in row]
            for row, request in zip(samples, requests, strict=True)
        ]

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Takes over a whole set of weights under their Hugging Face names, and forgets every cache of the old ones.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape. The engine then has no version and refuses to generate
                until an update succeeds.
            RuntimeError: Another thread is generating: its completions would be of two versions.
        """
        self._check_started("update_weights")
        if version < 0:
            raise ValueError(f"version={version} must not be negative")
        delivered: set[str] = set()
        with self._alone("update_weights"):
            self._version = None
            self._update_weights(self._checked(weights, delivered, version), version)
        missing = [name for name in self._weight_shapes if name not in delivered]
        if missing:
            hint = (
                " (a tied head must be delivered under its own name too)"
                if "lm_head.weight" in missing
                else ""
            )
            raise ValueError(f"update to version {version} did not deliver {_some(missing)}{hint}")
        self._version = version

    def read_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Copies on the CPU of the weights that the engine computes with, in its dtype, under their Hugging Face names or names of their parts."""
        self._check_started("read_weights")
        unknown = [name for name in names if split_part(name)[0] not in self._weight_shapes]
        if unknown:
            raise ValueError(f"the engine's model has no weight {_some(unknown)}")
        return self._read_weights(names)

    def differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
        """Names of the weights that an engine does not hold bit for bit as ``wanted`` (in its dtype), under the name of each copy that differs.

        An engine may hold several copies, one a server; one that lives in this process has one. In a run of several ranks a collective.
        """
        self._check_started("differing_weights")
        return self._differing_weights(wanted)

    @property
    def sleeps(self) -> bool:
        """Whether ``sleep`` does anything."""
        return False

    def sleep(self) -> None:
        """Nothing is generated for a while: an engine that ``sleeps`` gives back its memory, and has no weights until the next update."""
        if self.sleeps and self._token_bytes is not None:
            with self._alone("sleep"):
                self._version = None
                self._sleep()

    def interrupt(self) -> None:
        """Ends a ``generate`` that runs in another thread soon, and every later one until the engine is started anew."""
        self._is_interrupted = True

    def close(self) -> None:
        """Frees what the engine holds; it may be started again. May be called twice."""
        if self._token_bytes is not None:
            self._token_bytes, self._version, self._weight_shapes = None, None, {}
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _start(self, model_path: str, seed: int) -> None: ...

    @abstractmethod
    def _generate(self, requests: Sequence[GenerationRequest]) -> list[list[Sample]]: ...

    @abstractmethod
    def _update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes every tensor of the iterator; names and shapes are checked as they pass."""

    @abstractmethod
    def _read_weights(self, names: Sequence[str]) -> dict[str, Tensor]: ...

    @abstractmethod
    def _differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]: ...

    def _sleep(self) -> None:
        """Of an engine that ``sleeps``; it may be asleep already. The next ``_update_weights`` wakes it."""
        raise NotImplementedError

    @abstractmethod
    def _close(self) -> None: ...

    @contextlib.contextmanager
    def _alone(self, method: str) -> Iterator[None]:
        if self._under_way is not None:
            raise RuntimeError(
                f"{type(self).__name__}.{method} while {self._under_way} runs in another thread: wait for its end"
            )
        self._under_way = method
        try:
            yield
        finally:
            self._under_way = None

    def _check_interrupted(self) -> None:
        """A leaf asks this as often as it can while it generates."""
        if self._is_interrupted:
            raise GenerationInterrupted(f"{type(self).__name__} was interrupted")

    def _check_started(self, method: str) -> None:
        if self._token_bytes is None:
            raise RuntimeError(f"{type(self).__name__}.{method} before start")

    def _checked(
        self, weights: Iterable[tuple[str, Tensor]], delivered: set[str], version: int
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            expected = self._weight_shapes.get(name)
            if expected is None:
                raise ValueError(
                    f"update to version {version} delivers {name}, which the engine's model does not have"
                )
            if tensor.shape != expected:
                raise ValueError(
                    f"update to version {version} delivers {name} of shape {tuple(tensor.shape)}, the engine's model has {tuple(expected)}"
                )
            delivered.add(name)
            yield name, tensor

    def _completion(self, sample: Sample, sampling: SamplingSettings, version: int) -> Completion:
        token_ids = sample.token_ids
        stopped = token_ids[-1] in sampling.stop_token_ids
        tokens = [self._bytes_of(token_id) for token_id in (token_ids[:-1] if stopped else token_ids)]
        if sampling.stop_after_first_box:
            box = FirstBox(sampling.think_close)
            num_kept = next(
                (num for num, token in enumerate(tokens, start=1) if box.completed_by(token)), None
            )
            if num_kept is not None:
                token_ids, tokens, stopped = token_ids[:num_kept], tokens[:num_kept], True
        return Completion(
            token_ids=token_ids,
            text_bytes=b"".join(tokens),
            rollout_logprobs=sample.logprobs[: len(token_ids)],
            policy_version=version,
            finish_reason="stop" if stopped else "length",
        )

    def _bytes_of(self, token_id: int) -> bytes:
        assert self._token_bytes is not None
        return self._token_bytes.drawn(token_id)


def compare_own_copy(held: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """``differing_weights`` of an engine that lives in this process."""
    names = tuple(name for name in wanted if not torch.equal(held[name], wanted[name]))
    return {"this process's engine": names} if names else {}


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
