from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy_tokenizers as toys
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rpt_lightning.objectives.box import extract_prediction
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.paper_wordings import CONTEXT_SLOT, WORDINGS
from rpt_lightning.objectives.prompts.template import (
    BoundPrompt,
    ChatPrompt,
    ContinuationPrompt,
    PromptTemplate,
    QuestionPrompt,
)
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Completion

OPENING_TEMPLATE = toys.CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}"
)
TEMPLATES: list[PromptTemplate] = [
    *(ChatPrompt(version) for version in WORDINGS),
    ContinuationPrompt(),
    ContinuationPrompt(None, None),
]
BOUND = {
    (template_index, think): template.bind(toys.byte_level(think_tokens=think))
    for template_index, template in enumerate(TEMPLATES)
    for think in (False, True)
}
IDS = st.lists(st.integers(0, 399), max_size=12).map(tuple)


@settings(deadline=None)
@given(st.sampled_from(sorted(BOUND)), IDS, IDS, IDS)
def test_given_ids_are_untouched_slices(
    key: tuple[int, bool], context: tuple[int, ...], thought: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    bound = BOUND[key]
    prompt = bound.prompt_ids(context)
    assert len(prompt) == len(context) + bound.num_overhead_tokens
    start = len(bound.prefix_ids)
    assert prompt[start : start + len(context)] == context
    completion = bound.completion_ids(thought, answer)
    prefix = bound.answer_prefix_ids(thought)
    assert prefix[: len(thought)] == thought
    assert completion[: len(prefix)] == prefix
    assert completion[len(prefix) : len(prefix) + len(answer)] == answer
    assert completion[-1] == bound.stop_token_ids[0]


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(
    "template", TEMPLATES, ids=lambda template: getattr(template, "version", "continuation")
)
def test_a_composed_completion_is_parsed_back(template: PromptTemplate, think: bool) -> None:
    tokenizer = toys.byte_level(think_tokens=think)
    token_bytes, objective = (
        TokenBytes(tokenizer),
        NextTokenObjective(template, PrefixMatchReward()).bind(tokenizer),
    )
    answer = b" {x}\xf0\x9f"
    answer_ids = token_bytes.encode_plain(" {x}") + tuple(
        next(i for i in range(256) if token_bytes[i] == bytes([b])) for b in b"\xf0\x9f"
    )
    ids = objective.prompt.completion_ids(token_bytes.encode_plain("maybe \\boxed{no}"), answer_ids)
    completion = Completion(
        token_ids=ids,
        text_bytes=token_bytes.join(ids[:-1]),
        rollout_logprobs=(),
        policy_version=0,
        finish_reason="stop",
    )
    assert objective.prediction(completion) == answer


def rendered(bound: BoundPrompt, tokenizer, context: str = " 2 + 2 =") -> str:
    token_bytes = TokenBytes(tokenizer)
    return token_bytes.join(bound.prompt_ids(token_bytes.encode_plain(context))).decode()


def test_continuation_is_the_text_and_the_thought() -> None:
    tokenizer = toys.byte_level()
    bound = ContinuationPrompt().bind(tokenizer)
    assert rendered(bound, tokenizer) == " 2 + 2 =<think>"
    assert bound.stop_token_ids == (tokenizer.eos_token_id,)
    assert TokenBytes(tokenizer).join(bound.completion_ids((), ())) == b"</think>\\boxed{}<|endoftext|>"


def test_continuation_without_markers() -> None:
    tokenizer = toys.byte_level()
    bound = ContinuationPrompt(None, None).bind(tokenizer)
    assert rendered(bound, tokenizer) == " 2 + 2 ="
    assert bound.think_close is None
    assert (
        extract_prediction(
            TokenBytes(tokenizer).join(bound.completion_ids((), ())), think_close=bound.think_close
        )
        == b""
    )


def test_markers_are_tokens_where_the_tokenizer_has_them() -> None:
    tokenizer = toys.byte_level(think_tokens=True)
    added = tokenizer.get_added_vocab()
    for template in (ContinuationPrompt(), ChatPrompt()):
        bound = template.bind(tokenizer)
        assert bound.suffix_ids[-1] == added["<think>"]
        assert bound.answer_open_ids[0] == added["</think>"]
        assert bound.suffix_ids.count(added["<think>"]) == 1


def test_a_text_begins_as_the_tokenizer_begins_it() -> None:
    tokenizer = toys.byte_fallback()
    bound = ContinuationPrompt().bind(tokenizer)
    assert bound.prompt_ids((300, 301))[:3] == (tokenizer.bos_token_id, 300, 301)
    assert TokenBytes(tokenizer).join(bound.completion_ids((), ())) == b"</think>\\boxed{}<|endoftext|>"


@pytest.mark.parametrize("version", list(WORDINGS))
def test_chat_shows_question_and_context_in_the_chats_form(version: str) -> None:
    tokenizer = toys.byte_level()
    bound = ChatPrompt(version).bind(tokenizer)
    text = rendered(bound, tokenizer, context="ends in spaces  ")
    question = WORDINGS[version].replace(CONTEXT_SLOT, "ends in spaces  ")
    assert text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>"
    added = tokenizer.get_added_vocab()
    assert bound.prefix_ids[0] == added["<|im_start|>"]
    assert bound.stop_token_ids == (added["<|im_end|>"], added["<|endoftext|>"])


def test_a_template_that_opens_the_thought_is_left_alone() -> None:
    for think in (False, True):
        tokenizer = toys.byte_level(think_tokens=think, chat_template=OPENING_TEMPLATE)
        assert rendered(ChatPrompt().bind(tokenizer), tokenizer).endswith("<|im_start|>assistant\n<think>\n")


def test_wordings_are_seven_different_questions_in_the_papers_sense() -> None:
    assert list(WORDINGS) == ["v0", "v1", "v2", "v3", "v4", "v5", "v6"]
    assert len(set(WORDINGS.values())) == 7
    for version, wording in WORDINGS.items():
        assert wording.count(CONTEXT_SLOT) == 1
        assert "\\boxed{}" in wording
        assert "### Context" in wording
        assert (f"```\n{CONTEXT_SLOT}\n```" in wording) == (version != "v0")
    assert WORDINGS["v0"].endswith(CONTEXT_SLOT)
    assert all(example in WORDINGS["v4"] for example in (r"\boxed{ this}", r"\boxed{9}", "\\boxed{:\n}"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ChatPrompt("v7"), "version='v7'"),
        (lambda: ContinuationPrompt("", "</think>"), "cannot be empty"),
        (lambda: ChatPrompt("v0", "<think>", None), "both thought markers"),
        (lambda: ChatPrompt().bind(toys.byte_level(chat_template=None)), "no chat template"),
        (lambda: ChatPrompt().bind(toys.byte_level(chat_template="{{ 'hello' }}")), "0 times"),
    ],
)
def test_refused(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=toys.byte_level().backend_tokenizer)
    with pytest.raises(ValueError, match="eos_token"):
        ContinuationPrompt().bind(tokenizer)


def template(opening: str) -> str:
    return toys.CHAT_TEMPLATE.replace(
        "<|im_start|>assistant\n' }}", f"<|im_start|>assistant\n{opening}' }}}}"
    )


SWITCHED = toys.CHAT_TEMPLATE.replace(  # as in Qwen 3.5's small models: closed by default
    "<|im_start|>assistant\n' }}",
    "<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking %}"
    "{{ '<think>\n' }}{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
)


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize(
    ("opening", "shown"),
    [
        ("", "<think>"),  # absent
        ("<think>\n", "<think>\n"),  # opened
        ("<think>\nOkay, ", "<think>\nOkay, "),  # begun
        ("<think>\n\n</think>\n\n", "<think>"),  # closed at once
        ("<think>I thought.</think>\n\n", "<think>"),
        ("</think>", "<think>"),  # DeepSeek V3.1
        ("<think></think><think>\n", "<think></think><think>\n"),
    ],
)
def test_forms_of_the_thought(opening: str, shown: str, think: bool) -> None:
    tokenizer = toys.byte_level(think_tokens=think, chat_template=template(opening))
    for prompt in (ChatPrompt(), QuestionPrompt()):
        assert rendered(prompt.bind(tokenizer), tokenizer).endswith(
            f"<|im_end|>\n<|im_start|>assistant\n{shown}"
        )
    # Without a marked thought the template is used unchanged.
    assert rendered(ChatPrompt("v0", None, None).bind(tokenizer), tokenizer).endswith(
        f"<|im_start|>assistant\n{opening}"
    )


def test_a_template_that_only_speaks_of_the_markers() -> None:
    mention = toys.CHAT_TEMPLATE.replace(
        "m['content'] | trim + '<|im_end|>'", "m['content'] | trim + ' Think in <think>.<|im_end|>'"
    )
    tokenizer = toys.byte_level(chat_template=mention)
    assert rendered(ChatPrompt().bind(tokenizer), tokenizer).endswith(
        "Think in <think>.<|im_end|>\n<|im_start|>assistant\n<think>"
    )


def test_template_args_reach_the_template() -> None:
    tokenizer = toys.byte_level(chat_template=SWITCHED)
    for args, shown in (
        (None, "<think>"),
        ({"enable_thinking": True}, "<think>\n"),
        ({"enable_thinking": False}, "<think>"),
    ):
        assert rendered(QuestionPrompt(template_args=args).bind(tokenizer), tokenizer).endswith(
            f"assistant\n{shown}"
        )
    off = QuestionPrompt(None, None, {"enable_thinking": False}).bind(tokenizer)
    assert rendered(off, tokenizer).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("chat_template", "args", "named"),
    [
        (
            SWITCHED,
            {"enable_thinkng": True},
            r"template_args: the chat template of .* does not know 'enable_thinkng'",
        ),
        (
            SWITCHED,
            {"add_generation_prompt": False},
            r"template_args: add_generation_prompt is set by ChatPrompt itself",
        ),
        (template("<think></think>Answer: "), None, r"closes the thought and continues after it"),
        (
            "{{ raise_exception('only with a system message') }}",
            None,
            r"cannot be used \(TemplateError: only with a system message\)",
        ),
        ("{% if %}", None, r"cannot be used \(TemplateSyntaxError"),
    ],
)
def test_templates_that_are_refused(chat_template: str, args: dict[str, bool] | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ChatPrompt(template_args=args).bind(toys.byte_level(chat_template=chat_template))


@pytest.mark.parametrize(
    ("files", "more"),
    [
        ({"generation_config.json": {"eos_token_id": ["<|endoftext|>", "<|im_end|>"]}}, ["<|im_end|>"]),
        (
            {"generation_config.json": {"eos_token_id": ["<|im_end|>", "<|endoftext|>", "<|im_start|>"]}},
            ["<|im_end|>", "<|im_start|>"],
        ),
        ({"generation_config.json": {"eos_token_id": ["a"]}}, ["a"]),  # a list is never a class's default
        ({"generation_config.json": {"eos_token_id": "<|im_end|>"}}, ["<|im_end|>"]),
        ({"generation_config.json": {"eos_token_id": "a"}}, []),  # such as the 2 of a small Llama
        ({"generation_config.json": {}, "config.json": {"eos_token_id": ["<|im_end|>"]}}, ["<|im_end|>"]),
        ({"config.json": {"text_config": {"eos_token_id": ["<|im_end|>"]}}}, ["<|im_end|>"]),
        (
            {
                "generation_config.json": {"eos_token_id": ["<|im_end|>"]},
                "config.json": {"eos_token_id": ["<|im_start|>"]},
            },
            ["<|im_end|>"],
        ),
        ({}, []),
    ],
)
def test_every_end_that_the_models_folder_names(
    files: dict[str, dict[str, Any]], more: list[str], tmp_path: Path
) -> None:
    saved = toys.byte_level()
    saved.save_pretrained(tmp_path)

    def ids(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ids(part) for key, part in value.items()}
        return (
            [ids(part) for part in value] if isinstance(value, list) else saved.convert_tokens_to_ids(value)
        )

    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(ids(content)))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    end, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    wanted = [tokenizer.convert_tokens_to_ids(token) for token in more]
    assert ContinuationPrompt().bind(tokenizer).stop_token_ids == tuple(dict.fromkeys([end, *wanted]))
    assert ChatPrompt().bind(tokenizer).stop_token_ids == tuple(dict.fromkeys([turn, end, *wanted]))


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    toys.byte_level().save_pretrained(tmp_path)
    for content in ('{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}', "{", "[]"):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match=r"generation_config\.json: "):
            ContinuationPrompt().bind(PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_a_template_that_writes_the_date_gives_the_same_prompt_on_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }} " + toys.CHAT_TEMPLATE
    tokenizer = toys.byte_level(chat_template=template)
    prefix_ids = QuestionPrompt().bind(tokenizer).prefix_ids
    assert TokenBytes(tokenizer).join(prefix_ids).startswith(b"26 Jul 2024 <|im_start|>user")


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("{{ raise_exception('only for pictures') }}", "TemplateError: only for pictures"),
        ("{% for m in messages %}", "TemplateSyntaxError: "),
        ("{{ messages[7]['content'] }}", "UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    ],
    ids=["raises", "does not parse", "undefined", "division"],
)
def test_a_template_that_cannot_be_used_is_one_error(template: str, cause: str) -> None:
    with pytest.raises(ValueError, match=f"^the chat template of .* cannot be used \\({cause}"):
        QuestionPrompt().bind(toys.byte_level(chat_template=template))


def test_a_template_that_draws_is_refused() -> None:
    template = "{{ range(100000) | random }}" + toys.CHAT_TEMPLATE
    with pytest.raises(ValueError, match="gives a different text in every call"):
        QuestionPrompt().bind(toys.byte_level(chat_template=template))
