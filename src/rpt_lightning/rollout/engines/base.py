"""The contract of every rollout engine, and the checks that all engines share.

An engine holds its own copy of the policy's weights under a version number and completes prompts with it. It
refuses to generate before the first update and after an update that failed. Weights never change while it
generates, so a completion always comes from the version that is stamped on it. An engine may generate and
update in different threads, but only one after the other.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor
from transformers import AutoConfig

from rpt_lightning.objectives.thought import num_until_early_end
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.pretrained.tokenizer import as_in_folder, read_tokenizer
from rpt_lightning.rollout.engines.result_check import check_samples
from rpt_lightning.rollout.requests import check_requests
from rpt_lightning.rollout.weight_sync.file_names import make_skeleton
from rpt_lightning.rollout.weight_sync.sent_weights import SentWeights
from rpt_lightning.rollout.weight_sync.weight_part import split_part
from rpt_lightning.types import Completion, GenerationRequest, PromptTokens, SamplingSettings, TokenIds

EngineDtype = Literal["float32", "bfloat16"]
# Used if the model has no limit and none is given, as in vLLM.
DEFAULT_MODEL_LEN = 2048


class EngineLost(RuntimeError):
    """The engine cannot generate any more, although policy and request are valid.

    A run may end because of it and be resumed later.
    """


class GenerationInterrupted(RuntimeError):
    """``interrupt`` was called, so the completions are no longer needed."""


class Sample(NamedTuple):
    """One completion from a leaf engine: ids up to and including the stop token, and log-probs in nats."""

    token_ids: TokenIds
    logprobs: tuple[float, ...]


class RolloutEngine(ABC):
    """Base class of rollout engines. Start one, give it weights, let it generate, and close it.

    An engine is also a context manager. Leaf engines implement the methods with an underscore. The parameters
    of their ``__init__`` are flat.
    """

    def __init__(self, dtype: EngineDtype) -> None:
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._version: int | None = None
        self._max_model_len = 0
        self._weight_shapes: dict[str, torch.Size] = {}
        self._holds_base = False  # whether its weights are the base of an adapter
        self._token_bytes: TokenBytes | None = None
        # These are plain attributes because a lock could not be sent to another process with the engine. They
        # catch a programming mistake, not a race.
        self._under_way: str | None = None
        self._is_interrupted = False
        self.prompt_tokens: PromptTokens | None = None
        """Prompt tokens of all requests since the start, or None if the engine has no prefix cache."""

    @property
    def version(self) -> int | None:
        """The policy version of the weights, or None before the first update and after one that failed."""
        return self._version

    @property
    def servers(self) -> tuple[int, int] | None:
        """Number of usable servers, and how often a server was lost. None if the engine has no servers."""
        return None

    @property
    def sent_weights(self) -> SentWeights | None:
        """What the latest update sent to servers. None if the engine does not count it."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self._dtype

    @property
    def max_model_len(self) -> int:
        """Largest number of tokens of prompt and completion together. 0 before the start."""
        return self._max_model_len

    @property
    def weight_names(self) -> tuple[str, ...]:
        """The Hugging Face names that every update must contain, including a tied head's own name.

        It is empty while the engine is not started.
        """
        return tuple(self._weight_shapes)

    @property
    @abstractmethod
    def description(self) -> str:
        """One line that says what is running."""

    def start(self, model_path: str, *, seed: int, max_model_len: int | None = None) -> None:
        """Build the model of a Hugging Face folder without its weights, which ``update_weights`` provides.

        Args:
            model_path: Folder (or hub id) with configuration and tokenizer.
            seed: Seed for everything the engine draws except completions, which have their own seeds. An
                example is the weights before the first update.
            max_model_len: Tokens of prompt and completion together. None uses the length that the model was
                made for.
        """
        if self._token_bytes is not None:
            raise RuntimeError(f"{type(self).__name__} is already started; close it first")
        config = AutoConfig.from_pretrained(model_path)
        longest = longest_context(config)
        if max_model_len is not None and not 1 <= max_model_len <= (longest or max_model_len):
            raise ValueError(
                f"max_model_len={max_model_len} must lie between 1 and the {longest or 'unlimited'} "
                f"positions of {model_path}"
            )
        self._max_model_len = max_model_len or longest or DEFAULT_MODEL_LEN
        self._skeleton = make_skeleton(config)
        token_bytes = TokenBytes(as_in_folder(read_tokenizer(model_path), where=f"tokenizer of {model_path}"))
        self._is_interrupted = False
        self._start(model_path, seed)
        self._weight_shapes = {
            name: weight.shape for name, weight in self._skeleton.named_parameters(remove_duplicate=False)
        }
        self._token_bytes = token_bytes

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """Generate ``n`` completions for each request, in the order of the requests.

        Completion ``i`` is drawn with the seed ``seed + i``, and does not depend on what else is generated
        beside it. However, other batches round differently, which can decide a near tie. In fp32 this hardly
        ever happens. In bf16 it happens in a few completions if they are a hundred tokens long.

        Raises:
            RuntimeError: The engine has no weights.
            ValueError: A request cannot be served. The message names its task.
            GenerationInterrupted: Another thread called ``interrupt``.
            EngineLost: The servers or processes that generate are gone.
        """
        version = self._version
        if self._token_bytes is None or version is None:
            raise RuntimeError(
                f"{type(self).__name__} has no policy weights (not started, no update yet, or the last one "
                "failed): call update_weights first"
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
        """Load a whole set of weights under their Hugging Face names, and clear every cache of the old ones.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape. The engine then has no version and
                refuses to generate until an update succeeds.
            RuntimeError: Another thread is generating, so its completions would mix two versions.
        """
        self._check_started("update_weights")
        if version < 0:
            raise ValueError(f"version={version} must not be negative")
        delivered: set[str] = set()
        with self._alone("update_weights"):
            self._version, self._holds_base = None, False
            self._update_weights(self._checked(weights, delivered, version), version)
        missing = [name for name in self._weight_shapes if name not in delivered]
        if missing:
            hint = (
                " (a tied head must be included under its own name too)"
                if "lm_head.weight" in missing
                else ""
            )
            raise ValueError(f"the update to version {version} lacks {_some(missing)}{hint}")
        self._version = version

    @property
    def max_adapter_rank(self) -> int | None:
        """Largest rank of an adapter that ``update_adapter`` takes. None if the engine takes none."""
        return None

    def update_adapter(
        self, adapter: Mapping[str, Tensor], *, base: Iterable[tuple[str, Tensor]], version: int
    ) -> None:
        """Load an adapter that is multiplied beside the base's weights, and clear every cache.

        Args:
            adapter: A ``[r, in]`` and s B ``[out, r]`` of all layers, under their names in the policy's
                model.
            base: The weights without the adapter, under Hugging Face names. They are read to the end if the
                engine does not hold them, and else not at all.
            version: The policy's version.

        Raises:
            ValueError: The engine takes no adapter of this rank, or the base is not whole.
            RuntimeError: Another thread is generating.
        """
        self._check_started("update_adapter")
        rank = max((tensor.shape[0] for name, tensor in adapter.items() if ".lora_A." in name), default=0)
        if self.max_adapter_rank is None or not 1 <= rank <= self.max_adapter_rank:
            raise ValueError(
                f"{type(self).__name__} takes adapters up to rank {self.max_adapter_rank}, and the policy's "
                f"has rank {rank}; raise rollout.engine.max_adapter_rank, or leave it out to sync merged "
                "weights"
            )
        if not self._holds_base:
            self.update_weights(base, version=version)
            self._holds_base = True
        with self._alone("update_adapter"):
            self._version = None
            self._update_adapter(adapter, version)
        self._version = version

    def _update_adapter(self, adapter: Mapping[str, Tensor], version: int) -> None:
        """Replace the adapter. Only engines with a ``max_adapter_rank`` need this."""
        raise NotImplementedError

    def differing_adapter(self, wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Return the names of adapter tensors that do not equal ``wanted`` bit for bit.

        ``wanted`` has the names of ``update_adapter``, and the engine's dtype.
        """
        self._check_started("differing_adapter")
        held = self._read_adapter(tuple(wanted))
        return tuple(name for name, tensor in wanted.items() if not torch.equal(held[name], tensor))

    def _read_adapter(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Copy adapter tensors that the engine computes with to the CPU, in its dtype."""
        raise NotImplementedError

    def read_weights(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Copy weights that the engine computes with to the CPU, in its dtype.

        ``names`` are Hugging Face names or names of their parts.
        """
        self._check_started("read_weights")
        unknown = [name for name in names if split_part(name)[0] not in self._weight_shapes]
        if unknown:
            raise ValueError(f"the engine's model has no weight {_some(unknown)}")
        return self._read_weights(names)

    def differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
        """Return the names of weights that do not equal ``wanted`` bit for bit, for each copy that differs.

        The comparison is in the engine's dtype. The keys are the names of the copies. An engine may hold
        several copies, one for each server. An engine in this process has one. In a run with several ranks
        this is a collective.
        """
        self._check_started("differing_weights")
        return self._differing_weights(wanted)

    @property
    def sleeps(self) -> bool:
        """Whether ``sleep`` has any effect."""
        return False

    def sleep(self) -> None:
        """Free memory while nothing is generated.

        An engine that ``sleeps`` has no weights until the next update.
        """
        if self.sleeps and self._token_bytes is not None:
            with self._alone("sleep"):
                self._version, self._holds_base = None, False
                self._sleep()

    def interrupt(self) -> None:
        """Soon end a ``generate`` that runs in another thread, and every later one until the next start."""
        self._is_interrupted = True

    def close(self) -> None:
        """Free what the engine holds. It may be started again, and closed twice."""
        if self._token_bytes is not None:
            self._token_bytes, self._version, self._weight_shapes = None, None, {}
            self._holds_base = False
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
        """Consume every tensor of the iterator, which checks names and shapes as they pass."""

    @abstractmethod
    def _read_weights(self, names: Sequence[str]) -> dict[str, Tensor]: ...

    @abstractmethod
    def _differing_weights(self, wanted: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]: ...

    def _sleep(self) -> None:
        """Free memory, if the engine ``sleeps``. It may already be asleep. ``_update_weights`` wakes it."""
        raise NotImplementedError

    @abstractmethod
    def _close(self) -> None: ...

    @contextlib.contextmanager
    def _alone(self, method: str) -> Iterator[None]:
        if self._under_way is not None:
            raise RuntimeError(
                f"{type(self).__name__}.{method} while {self._under_way} runs "
                "in another thread: wait for it to end"
            )
        self._under_way = method
        try:
            yield
        finally:
            self._under_way = None

    def _check_interrupted(self) -> None:
        """Raise GenerationInterrupted after ``interrupt``. Leaf engines call this often in ``_generate``."""
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
                    f"the update to version {version} contains {name}, which the engine's model does not have"
                )
            if tensor.shape != expected:
                raise ValueError(
                    f"the update to version {version} contains {name} with shape {tuple(tensor.shape)}, but "
                    f"the engine's model has {tuple(expected)}"
                )
            delivered.add(name)
            yield name, tensor

    def _completion(self, sample: Sample, sampling: SamplingSettings, version: int) -> Completion:
        token_ids = sample.token_ids
        stopped = token_ids[-1] in sampling.stop_token_ids
        tokens = [self._bytes_of(token_id) for token_id in (token_ids[:-1] if stopped else token_ids)]
        num_kept = num_until_early_end(tokens, sampling)
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
    """Compute ``differing_weights`` of an engine that lives in this process."""
    names = tuple(name for name in wanted if not torch.equal(held[name], wanted[name]))
    return {"this process's engine": names} if names else {}


def _some(names: Sequence[str]) -> str:
    """Join the first few names, and count the rest."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
