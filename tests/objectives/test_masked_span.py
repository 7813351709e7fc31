"""What a masked span is, what hides it, which answers are right, and that nothing of it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.box import extract_prediction
from rpt_lightning.objectives.masked_span import MaskedSpanObjective
from rpt_lightning.objectives.prompts.template import ChatPrompt, ContinuationPrompt, QuestionPrompt
from rpt_lightning.types import AnsweredTask, Completion, TokenTask

# Words of several scripts, accents of one and of two characters, emoji of four bytes, and what may surround
# them.
PIECES = st.sampled_from(
    [
        "the",
        "sum",
        "don't",
        "co-op",
        "été",
        "e\u0301te\u0301",
        "ποσό",
        "сумма",
        "हिन्दी",
        "和",
        "🙂",
        "x_1",
        "42",
    ]
    + [" "] * 12
    + ["  ", "\n", ". ", ", ", "(", ")", "{", "}", '"', "'", "-", "--", "\\boxed{", "</think>", "a"]
)
TEXTS = st.lists(PIECES, min_size=3, max_size=40).map("".join)
SETTINGS = [
    {},
    {"max_length": 3, "max_tokens": 16},
    {"unit": "token"},
    {"unit": "token", "max_length": 5, "max_tokens": 9, "num_behind": 3},
]


_BOUND: dict[str, BoundObjective] = {}


def bound_to(tokenizer, **settings) -> BoundObjective:
    """Bind once: a tokenizer's bytes take a while to read."""
    key = f"{tokenizer.name_or_path} {settings}"
    if key not in _BOUND:
        _BOUND[key] = MaskedSpanObjective(**settings).bind(tokenizer)
    return _BOUND[key]


def task_at(bound: BoundObjective, token_ids: Sequence[int], position: int, *, reach: int = 16) -> TokenTask:
    """The task that a task folder makes of a position."""
    objective = bound.objective
    continuation_ids = tuple(token_ids[position : position + reach])
    return TokenTask(
        task_id=f"d:{position}",
        doc_id="d",
        position=position,
        context_ids=tuple(token_ids[:position]),
        continuation_ids=continuation_ids,
        continuation=tuple(bound.tokens[token] for token in continuation_ids),
        entropy=1.0,
        true_prob=0.5,
        true_rank=0,
        answerable=True,
        following_ids=tuple(token_ids[position : position + objective.num_following_tokens]),
    )


def tasks_of(bound: BoundObjective, text: str) -> list[TokenTask]:
    token_ids = bound.tokens.encode_plain(text)
    pieces = [bound.tokens[token] for token in token_ids]
    return [
        task_at(bound, token_ids, position)
        for position in range(1, len(token_ids))
        if bound.objective.may_ask(pieces, position)
    ]


def truth_of(bound: BoundObjective, task: TokenTask) -> bytes:
    return b"".join(bound.truth(task))


@pytest.mark.parametrize(
    ("pieces", "position", "hidden"),
    [
        ([b"of", b" the", b" sum"], 1, b"the"),
        ([b"of", b" su", b"m", b"mand", b","], 1, b"summand"),
        ([b"of", b" sum", b"mand"], 1, None),  # nothing shows where it ends
        ([b"of", b" su", b"mmand"], 2, None),  # inside a word
        ([b"of", b" su", b"mmand", b" "], 2, None),
        ([b"(", b"sum", b")"], 1, b"sum"),
        ([b"\n", b"sum", b" of"], 1, b"sum"),
        ([b"of", b" ", b"sum", b"."], 1, b"sum"),  # the space is a token of its own
        ([b"of", b"  ", b"sum", b"."], 1, None),
        ([b"of", b" ", b"sum", b"."], 2, None),
        ([b"of", b"  ", b"sum", b"."], 2, None),
        ([b"I", b" don", b"'t", b" know"], 1, b"don't"),
        ([b"I", b" don", b"'t", b" know"], 2, None),
        ([b"a", b" co", b"-", b"op", b"."], 1, b"co-op"),
        ([b"a", b" co", b"-", b" op", b"."], 1, b"co"),  # a hyphen that joins nothing
        ([b"a", b" co", b"--", b"op"], 1, b"co"),
        ([b"a", b" co", b"-"], 1, None),  # what follows the hyphen is unknown
        ([b"a", b" 12", b"3", b"."], 1, b"123"),
        ([b"a", b" caf", "e\u0301".encode(), b" is"], 1, "cafe\u0301".encode()),
        ([b"a", b" cafe", "\u0301".encode(), b" is"], 1, "cafe\u0301".encode()),
        ([b"a", b" \xc3", b"\xa9t\xc3", b"\xa9", b" is"], 1, "été".encode()),
        ([b"a", b" \xc3", b"\xa9t\xc3", b"\xa9", b" is"], 2, None),  # inside a character
        ([b"a", b" word", b"\xc3", b"\xa9", b"."], 1, "wordé".encode()),
        ([b"a", b" word.", b" "], 1, None),  # no token begins where it ends
        ([b"a", b".", b" b"], 1, None),
        ([b"a", b" ", b" b", b" c"], 1, None),
    ],
)
def test_what_a_word_is(pieces, position, hidden):
    objective = MaskedSpanObjective()
    assert objective.may_ask(pieces, position) is (hidden is not None)
    if hidden is not None:
        task = TokenTask(
            task_id="d:1", doc_id="d", position=position, context_ids=(), continuation_ids=(),
            continuation=tuple(pieces[position:]), entropy=1.0, true_prob=0.5, true_rank=0, answerable=True,
        )  # fmt: skip
        assert b"".join(objective.truth(task)) == hidden


def test_the_prompt_shows_both_sides_and_the_mark(tiny_tokenizer):
    bound = bound_to(tiny_tokenizer, num_behind=2, question="\nWhich?")
    encode = bound.tokens.encode_plain
    token_ids = encode("The sum of all parts is more")
    position = len(encode("The sum of"))
    task = task_at(bound, token_ids, position)
    behind = bound.tokens.join(token_ids[position + len(encode(" all")) :][:2]).decode()
    assert truth_of(bound, task) == b"all"
    assert bound.tokens.join(bound.prompt_ids(task)).decode() == f"The sum of ____{behind}\nWhich?<think>"
    # The limit for prompts covers it.
    assert len(bound.prompt_ids(task)) <= len(task.context_ids) + bound.num_overhead_tokens


@pytest.mark.parametrize("settings", SETTINGS)
@given(text=TEXTS)
def test_the_text_is_hidden_whole_and_only_it(tiny_tokenizer, settings, text):
    """Before, hidden text and what is behind make the document again, and the mark stands for the middle."""
    bound = bound_to(tiny_tokenizer, **settings)
    token_ids = bound.tokens.encode_plain(text)
    for task in tasks_of(bound, text):
        hidden = truth_of(bound, task)
        assert hidden.strip()
        hidden.decode()
        before = bound.tokens.join(token_ids[: task.position])
        before.decode()  # it does not end inside a character, which would show a part of the span
        rest = text.encode()[len(before) :]
        space = b" " if rest.startswith(b" ") else b""
        assert rest.startswith(space + hidden)
        behind = rest[len(space + hidden) :]
        assert behind
        behind.decode()
        context = bound.tokens.join(bound.objective.context_ids(task, bound.tokens))
        shown = context.removeprefix(before + space + b"____")
        assert len(shown) == len(context) - len(before + space + b"____")
        assert shown
        assert behind.startswith(shown)
        if len(shown) < len(behind):
            last = len(bound.objective.context_ids(task, bound.tokens)) - len(task.context_ids)
            assert last == bound.objective.num_behind + len(
                bound.tokens.encode_plain(space.decode() + "____")
            )


@given(text=TEXTS)
def test_the_tokens_around_a_word_do_not_depend_on_it(tiny_tokenizer, text):
    """Otherwise the way in which the text is cut into tokens would tell something about the hidden word."""
    bound = bound_to(tiny_tokenizer, max_length=2)
    encode, join = bound.tokens.encode_plain, bound.tokens.join
    token_ids = encode(text)
    for task in tasks_of(bound, text):
        assert encode(join(task.context_ids).decode()) == task.context_ids
        rest = join(token_ids[task.position :])
        hidden = (b" " if rest.startswith(b" ") else b"") + truth_of(bound, task)
        behind = rest.removeprefix(hidden).decode()
        assert token_ids[-len(encode(behind)) :] == encode(behind)


@pytest.mark.parametrize("settings", SETTINGS)
@given(text=TEXTS, data=st.data())
def test_the_hidden_text_is_right_and_one_byte_off_is_wrong(tiny_tokenizer, settings, text, data):
    bound = bound_to(tiny_tokenizer, **settings)
    tasks = tasks_of(bound, text)
    assume(tasks)
    task = data.draw(st.sampled_from(tasks))
    hidden = truth_of(bound, task)
    assert bound.is_right(hidden, task)
    place = data.draw(st.integers(0, len(hidden) - 1))
    other = data.draw(st.integers(1, 255))
    changed = hidden[:place] + bytes([hidden[place] ^ other]) + hidden[place + 1 :]
    cut = hidden[:place] + hidden[place + 1 :]
    for wrong in (changed, cut, hidden + b" ", b" " + hidden, hidden + hidden[-1:], b"", None):
        assert not bound.is_right(wrong, task)
    # A completion that boxes it is read and rewarded.
    texts = [b"hm</think>\\boxed{" + content + b"}" for content in (hidden, changed, b" " + hidden)]
    assert extract_prediction(texts[0]) == hidden
    completions = tuple(
        Completion(
            token_ids=(1,), text_bytes=one, rollout_logprobs=(0.0,), policy_version=0, finish_reason="stop"
        )
        for one in texts
    )
    completions += (replace(completions[0], finish_reason="length"),)
    answered = AnsweredTask(
        task=task,
        prompt_ids=(),
        completions=completions,
        predictions=tuple(map(bound.prediction, completions)),
    )
    assert bound.rewards(answered) == (1.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("settings", SETTINGS)
@given(text=TEXTS)
def test_without_a_thought_the_policy_writes_the_text_and_closes_the_box(tiny_tokenizer, settings, text):
    bound = bound_to(tiny_tokenizer, **settings)
    for task in tasks_of(bound, text)[:4]:
        direct = bound.direct_sequence(task)
        assert direct.prompt_ids == bound.prompt_ids(task) + bound.prompt.answer_open_ids
        assert bound.tokens.join(direct.target_ids) == truth_of(bound, task) + b"}"
        # As the control with an empty thought reads it.
        read = bound.objective.read_answer(bound.tokens.join(direct.target_ids))
        assert bound.is_right(read, task)


def test_the_length_of_a_span_is_drawn(tiny_tokenizer):
    pieces = [b"so"] + [b" word"] * 9 + [b"."]
    counts = {1: 0, 2: 0, 3: 0}
    for seed in range(600):
        objective = MaskedSpanObjective(max_length=3, seed=seed)
        assert objective.may_ask(pieces, 1)
        counts[objective.span_length(pieces[1:9], 1)] += 1
    assert all(150 < count < 250 for count in counts.values())  # 200 each; four standard deviations are 46
    # The end of the words limits it.
    two = [b"so", b" one", b" two", b",", b" three"]
    lengths = {MaskedSpanObjective(max_length=3, seed=seed).span_length(two[1:], 1) for seed in range(50)}
    assert lengths == {1, 2}
    # It does not depend on what else a caller knows of the document.
    objective = MaskedSpanObjective(max_length=3, max_tokens=4)
    assert [objective.span_length(pieces[1:end], 1) for end in (5, 8, 11)] == [
        objective.span_length(pieces[1:5], 1)
    ] * 3


def test_a_span_of_tokens_needs_something_to_hide_a_box_that_holds_it_and_whole_characters():
    def asked(pieces: list[bytes]) -> bool:
        return MaskedSpanObjective(unit="token").may_ask(pieces, 1)

    assert asked([b"a", b"bc", b"d"])
    assert not asked([b"a", b"bc"])  # nothing behind
    assert not asked([b"a", b" ", b"d"])
    assert not asked([b"a", b"\n\n", b"d"])
    assert not asked([b"a", b"}", b"d"])
    assert not asked([b"a", b"{", b"d"])
    assert asked([b"a", b"{}", b"d"])
    assert not asked([b"a", b"\xc3", b"\xa9"])
    assert not asked([b"\xc3", b"\xa9", b"d"])


def test_a_document_that_holds_the_mark_is_not_asked_about(tiny_tokenizer):
    text = "Fill in the name here: ____ and sign it"
    assert not tasks_of(bound_to(tiny_tokenizer), text)
    assert tasks_of(bound_to(tiny_tokenizer, mark="<gap>"), text)
    assert tasks_of(bound_to(tiny_tokenizer), text.replace("____", "thing"))


def test_a_task_without_a_span_is_refused(tiny_tokenizer):
    bound = bound_to(tiny_tokenizer)
    token_ids = bound.tokens.encode_plain("One. Two")
    task = task_at(bound, token_ids, len(bound.tokens.encode_plain("One")))
    with pytest.raises(
        ValueError, match=r"task 'd:\d': no span begins there.*--objective MaskedSpanObjective"
    ):
        bound.prompt_ids(task)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_length": 0}, "max_length 0: must be at least 1"),
        ({"num_behind": 0}, "num_behind 0: must be at least 1"),
        ({"max_length": 8}, r"max_tokens 8: a span of 8 words .* at least 9 tokens; raise it"),
        ({"mark": ""}, "mark '': it must be visible"),
        ({"mark": " "}, "mark ' ': it must be visible"),
        ({"prompt": ChatPrompt()}, "cannot use ChatPrompt"),
    ],
)
def test_settings_that_ask_nothing_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        MaskedSpanObjective(**settings)


@pytest.mark.parametrize("prompt", [ContinuationPrompt(), QuestionPrompt(), None])
def test_it_takes_any_prompt_that_asks_for_no_next_token(tiny_tokenizer, prompt):
    bound = bound_to(tiny_tokenizer, prompt=prompt, question=" Which text is hidden?")
    (task, *_) = tasks_of(bound, "The sum of all parts")
    assert b"____" in bound.tokens.join(bound.prompt_ids(task))


def test_other_settings_are_other_places():
    settings = [{}, {"unit": "token"}, {"max_length": 2}, {"max_tokens": 9}, {"seed": 1}]
    assert len({MaskedSpanObjective(**one).places for one in settings}) == 5
    # How a span is shown does not matter.
    shown = MaskedSpanObjective(num_behind=3, mark="<gap>", question="?")
    assert shown.places == MaskedSpanObjective().places
