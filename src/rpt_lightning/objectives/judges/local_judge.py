"""A judge in this process: a chat model from a folder or the hub, run with transformers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rpt_lightning.objectives.judges.segment_judge import SegmentJudge
from rpt_lightning.pretrained.tokenizer import first_line, read_tokenizer
from rpt_lightning.pretrained.weights import load_causal_lm

FLAG = "--rollout.objective.reward.judge"


class LocalJudge(SegmentJudge):
    """Ask a chat model in this process. It is loaded when it is first asked, once for each rank.

    It shares the device with policy and engine, so it suits small models. Replies are greedy. If one has no
    verdict, another is sampled.

    Args:
        model: Folder or hub id of a chat model.
        dtype: Precision of its weights.
        device: Device that it runs on, such as cpu or cuda:0. "auto" uses CUDA if available.
        max_reply_tokens: Maximum length of a reply, in tokens.
        batch_size: Number of predictions that it judges at the same time.
    """

    def __init__(
        self,
        model: str,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        device: str = "auto",
        max_reply_tokens: int = 256,
        batch_size: int = 8,
    ) -> None:
        for flag, value in (("max_reply_tokens", max_reply_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{FLAG}.{flag} {value}: must be at least 1")
        self.model = model
        self.dtype = dtype
        self.device = device
        self.max_reply_tokens = max_reply_tokens
        self.batch_size = batch_size
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
        self._lock = threading.Lock()  # rollouts may be rewarded in a thread of their own

    @property
    def name(self) -> str:
        return f"LocalJudge ({self.model})"

    def replies(self, prompts: Sequence[str], *, attempt: int) -> list[str]:
        with self._lock:
            model, tokenizer = self._load()
            return [
                reply
                for start in range(0, len(prompts), self.batch_size)
                for reply in self._reply(
                    model, tokenizer, prompts[start : start + self.batch_size], is_sampled=attempt > 0
                )
            ]

    def _load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            where = f"{FLAG}.model {self.model}"
            try:
                tokenizer = read_tokenizer(self.model)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{where}: its tokenizer cannot be loaded ({first_line(error)}); "
                    "give the folder or the hub id of a chat model"
                ) from error
            if not tokenizer.chat_template:
                raise ValueError(
                    f"{where}: its tokenizer has no chat template, so it cannot be asked; give a chat model"
                )
            try:
                model = load_causal_lm(self.model, where=where, dtype=getattr(torch, self.dtype))
            except ValueError as error:
                if str(error).startswith(where):
                    raise
                raise ValueError(f"{where}: it cannot be loaded ({first_line(error)})") from error
            is_cuda = self.device == "auto" and torch.cuda.is_available()
            device = f"cuda:{torch.cuda.current_device()}" if is_cuda else self.device
            model = model.to("cpu" if device == "auto" else device).eval()  # type: ignore[arg-type]
            self._loaded = model, tokenizer
        return self._loaded

    @torch.no_grad()
    def _reply(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        is_sampled: bool,
    ) -> list[str]:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        rows: list[Any] = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            for chat in chats
        ]
        longest = max(map(len, rows))
        # Padded on the left, so that every reply begins right after its prompt.
        input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        settings: dict[str, Any] = {"do_sample": is_sampled}
        if is_sampled:
            settings |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        written: Any = model.generate(  # type: ignore[operator]
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=self.max_reply_tokens,
            pad_token_id=0,
            **settings,
        )
        texts: list[str] = tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return texts
