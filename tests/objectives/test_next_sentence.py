"""Next sentence (BERT): candidates, letters, and what is right."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from scipy.stats import chisquare
from test_next_segment import answered, boxed, documents_of, positions_of, task_of

from rpt_lightning.objectives.next_sentence import LETTERS, Choice, NextSentenceObjective, choice_of
from rpt_lightning.objectives.prompts.template import ChatPrompt, ContinuationPrompt, QuestionPrompt

WORDS = ("tree", "house", "river", "stone", "cloud", "light", "road", "bread", "field", "horse", "water")


def story(seed: int, num: int = 8) -> str:
    rng = random.Random(seed)
    return " ".join(
        f"The {rng.choice(WORDS)} is near the {rng.choice(WORDS)} {number}." for number in range(num)
    )


@pytest.fixture(scope="module")
def stories(tiny_tokenizer):
    return documents_of(tiny_tokenizer, *(story(seed) for seed in range(12)))


def choices(objective, documents):
    """The choice of every task of the documents, with the document's number."""
    return [
        (number, choice_of(task_of(objective, documents, position, number)))
        for number in range(len(documents))
        for position in positions_of(objective, documents, number)
        if objective.material(documents, number, position) is not None
    ]


@pytest.mark.parametrize("from_others", [0, 1, 3])
@pytest.mark.parametrize("where", ["behind", "any"])
def test_where_candidates_come_from(stories, from_others, where):
    objective = NextSentenceObjective(num_from_others=from_others, same_document=where)
    texts = [story(seed) for seed in range(12)]
    found = choices(objective, stories)
    # "behind": the last sentences of a story have too few behind them.
    missing = 0 if where == "any" else 3 - from_others
    assert len(found) == 12 * (8 - missing)
    for number, choice in found:
        truth = choice.candidates[choice.right]
        wrong = [text for text in choice.candidates if text != truth]
        assert len(choice.candidates) == len(set(choice.candidates)) == 4
        assert len(wrong) == 3  # the truth is there once
        assert truth in texts[number]
        own = [text for text in wrong if text in texts[number]]
        assert len(own) == 3 - from_others
        assert all(any(text in other for other in texts) for text in wrong)
        if where == "behind":
            assert all(texts[number].index(text) > texts[number].index(truth) for text in own)


def test_the_right_letter_is_uniform(tiny_tokenizer):
    documents = documents_of(tiny_tokenizer, *(story(seed, num=20) for seed in range(40)))
    objective = NextSentenceObjective(num_candidates=4, num_from_others=3)
    found = choices(objective, documents)
    counts = Counter(choice.letter for _, choice in found)
    assert len(found) == 800
    assert set(counts) == set("ABCD")
    assert chisquare(list(counts.values())).pvalue > 0.001
    # The candidate of the document itself does not betray the truth by its place either.
    mixed = choices(NextSentenceObjective(num_candidates=3, num_from_others=1), documents)
    places = Counter(
        index
        for number, choice in mixed
        for index, text in enumerate(choice.candidates)
        if index != choice.right and text in story(number, num=20)
    )
    assert chisquare(list(places.values())).pvalue > 0.001


def test_candidates_depend_on_seed_document_and_position_alone(stories, tiny_tokenizer):
    objective, again = NextSentenceObjective(), NextSentenceObjective()
    position = positions_of(objective, stories)[2]
    material = objective.material(stories, 0, position)
    objective.material(stories, 3, positions_of(objective, stories, 3)[1])  # whatever was asked before
    assert objective.material(stories, 0, position) == again.material(stories, 0, position) == material
    assert NextSentenceObjective(seed=1).material(stories, 0, position) != material
    orders = {
        choice_of(task_of(objective, stories, position)).candidates
        for position in positions_of(objective, stories)[:4]
    }
    assert len(orders) == 4
    # Inside the document, other documents do not matter.
    inside = NextSentenceObjective(num_from_others=0)
    alone = documents_of(tiny_tokenizer, story(0))
    assert inside.material(alone, 0, position) == inside.material(stories, 0, position)


def test_no_distractor(tiny_tokenizer):
    objective = NextSentenceObjective(num_candidates=2, num_from_others=1)
    alone = documents_of(tiny_tokenizer, story(0))
    assert objective.material(alone, 0, positions_of(objective, alone)[0]) is None
    same = documents_of(tiny_tokenizer, "It rained a lot.", "It rained a lot.", "No sentence here")
    assert objective.material(same, 0, 0) is None  # the only other sentence is the truth itself
    repeated = documents_of(tiny_tokenizer, "It rained a lot. It  rained\na lot. It rained a lot.")
    inside = NextSentenceObjective(num_candidates=2, num_from_others=0, same_document="any")
    assert inside.material(repeated, 0, 0) is None


def test_the_hardest_of_several(tiny_tokenizer):
    texts = ["The ball is under cup 3.", *["One two three four."] * 4, "The ball is under cup 5."]
    texts = [f"{text} Number {index} ends here." for index, text in enumerate(texts)]
    documents = documents_of(tiny_tokenizer, *texts)
    hard = NextSentenceObjective(num_candidates=2, num_from_others=1, hardest_of=64)
    choice = choice_of(task_of(hard, documents, 0))
    assert set(choice.candidates) == {"The ball is under cup 3.", "The ball is under cup 5."}
    easy = [
        choice_of(task_of(NextSentenceObjective(num_candidates=2, seed=seed), documents, 0)).candidates
        for seed in range(20)
    ]
    assert any("The ball is under cup 5." not in candidates for candidates in easy)


def test_what_the_policy_sees(tiny_tokenizer, stories):
    for prompt in (ContinuationPrompt(), QuestionPrompt()):
        objective = NextSentenceObjective(prompt)
        task = task_of(objective, stories, positions_of(objective, stories)[1])
        bound, choice = objective.bind(tiny_tokenizer), choice_of(task)
        context = objective.context_ids(task, bound.tokens)
        assert context[: len(task.context_ids)] == task.context_ids
        added = context[len(task.context_ids) :]
        assert len(added) <= objective.num_added_tokens
        shown = bound.tokens.join(added).decode()
        listed = "".join(
            f"\n{letter}: {text}" for letter, text in zip("ABCD", choice.candidates, strict=True)
        )
        assert listed in shown
        if isinstance(prompt, ContinuationPrompt):
            assert shown == listed + "\n"
            # The parts are those of the whole, so worked examples have the same tokens.
            assert added == bound.tokens.encode_plain(shown)
        else:
            assert "\\boxed{}" in shown
        direct = bound.direct_sequence(task)
        assert direct.prompt_ids == bound.prompt_ids(task) + bound.prompt.answer_open_ids
        assert bound.tokens.join(direct.target_ids).decode() == choice.letter


def test_rewards(tiny_tokenizer, stories):
    objective = NextSentenceObjective()
    task = task_of(objective, stories, positions_of(objective, stories)[0])
    task = replace(task, material=Choice(candidates=("One.", "Two.", "Three.", "Four."), right=2).to_text())
    bound = objective.bind(tiny_tokenizer)
    texts = boxed("C", " c ", "(C)", "C: Three.", "A", "Three.", "A or C", "")
    group = answered(bound, task, *texts, "C")
    assert bound.rewards(group) == (1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert bound.truth(task) == (b"C",)


def test_the_folder_remembers_what_was_drawn():
    places = {
        NextSentenceObjective(**options).places
        for options in (
            {}, {"num_candidates": 3}, {"num_from_others": 0}, {"same_document": "any"}, {"hardest_of": 2},
            {"max_tokens": 32}, {"min_words": 4}, {"seed": 1},
        )
    }  # fmt: skip
    assert len(places) == 8


def test_refused_options():
    with pytest.raises(ValueError, match="NextSentenceObjective cannot use ChatPrompt"):
        NextSentenceObjective(ChatPrompt())
    with pytest.raises(ValueError, match=f"num_candidates 1: give a number from 2 to {len(LETTERS)}"):
        NextSentenceObjective(num_candidates=1)
    with pytest.raises(ValueError, match="num_from_others 4: one of the --num_candidates 4 is the true"):
        NextSentenceObjective(num_from_others=4)
    with pytest.raises(ValueError, match="hardest_of 0"):
        NextSentenceObjective(hardest_of=0)
