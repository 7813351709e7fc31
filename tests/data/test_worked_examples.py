from __future__ import annotations

import pytest

from rpt_lightning.data.modules.worked_examples import ExampleWriter, Phase
from rpt_lightning.objectives.box import extract_prediction
from rpt_lightning.objectives.masked_span import MaskedSpanObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import Document, Mark

TEXT = "Two and two is four."
MARK = Mark(start=11, end=19, fields={"depth": 2}, thought=" one two three four")
DOCUMENT = Document(doc_id="sum", text=TEXT, marks=(MARK,))


@pytest.fixture(scope="module")
def token_bytes(tiny_tokenizer) -> TokenBytes:
    return TokenBytes(tiny_tokenizer)


@pytest.fixture
def writer(tiny_tokenizer, token_bytes):
    def make(*phases: Phase, seed: int = 0) -> ExampleWriter:
        return ExampleWriter(
            ContinuationPrompt().bind(tiny_tokenizer), token_bytes, phases or (Phase(),), seed=seed
        )

    return make


def test_an_example_thinks_and_answers_in_a_box(writer, token_bytes: TokenBytes, tiny_tokenizer) -> None:
    (example,) = writer().write(DOCUMENT, step=0)
    # The marker that opens the thought is not a target.
    assert token_bytes.join(example.prompt_ids) == b"Two and two<think>"
    end = token_bytes[tiny_tokenizer.eos_token_id]
    completion = token_bytes.join(example.target_ids)
    assert completion == b" one two three four</think>\\boxed{ is four}" + end
    assert extract_prediction(completion.removesuffix(end), think_close=b"</think>") == b" is four"


def test_an_example_that_guesses_has_an_empty_thought(writer, token_bytes: TokenBytes) -> None:
    (example,) = writer(Phase(p_cot=0.0)).write(DOCUMENT, step=0)
    assert token_bytes.join(example.target_ids).startswith(b"</think>\\boxed{ is four}")
    assert writer(Phase(p_cot=0.0, guesses=False)).write(DOCUMENT, step=0) == []


def test_phases_follow_each_other_and_the_last_one_stays(writer) -> None:
    phases = Phase(steps=2, p_cot=1.0), Phase(steps=3, p_cot=0.0), Phase(steps=1, p_cot=1.0, max_depth=1)
    made = [writer(*phases).phase(step) for step in range(8)]
    assert made == [phases[0]] * 2 + [phases[1]] * 3 + [phases[2]] * 3


@pytest.mark.parametrize(
    ("low", "high", "thinks"), [(0, None, True), (2, 2, True), (3, None, False), (0, 1, False)]
)
def test_only_some_depths_think(
    writer, token_bytes: TokenBytes, low: int, high: int | None, thinks: bool
) -> None:
    (example,) = writer(Phase(min_depth=low, max_depth=high)).write(DOCUMENT, step=0)
    assert (b"one two" in token_bytes.join(example.target_ids)) is thinks


def test_the_share_that_thinks_is_p_cot_and_depends_on_seed_document_and_step(writer) -> None:
    length = len(writer(Phase(p_cot=0.0)).write(DOCUMENT, step=0)[0].target_ids)

    def thinking(seed: int, steps: range) -> list[bool]:
        made = writer(Phase(p_cot=0.3), seed=seed)
        return [len(made.write(DOCUMENT, step=step)[0].target_ids) > length for step in steps]

    drawn = thinking(0, range(2000))
    assert 0.27 < sum(drawn) / 2000 < 0.33  # four standard deviations are 0.041
    assert drawn[500:600] == thinking(0, range(500, 600))  # regardless of earlier draws
    assert drawn != thinking(1, range(2000))


def test_a_mark_inside_a_token_is_refused(writer) -> None:
    # " is" is a single token.
    document = Document(doc_id="d", text=TEXT, marks=(Mark(start=12, end=19, thought="x"),))
    with pytest.raises(ValueError, match=r"--data.source: the text 'is four' is marked.*mark whole tokens"):
        writer().write(document, step=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps=0"),
        ({"p_cot": 1.1}, r"p_cot=1\.1"),
        ({"p_cot": 0.0, "guesses": False, "text": False}, "nothing would be trained"),
    ],
)
def test_a_phase_that_cannot_be_is_refused(settings, says) -> None:
    with pytest.raises(ValueError, match=says):
        Phase(**settings)


def asked_by(tiny_tokenizer, token_bytes: TokenBytes, **settings) -> ExampleWriter:
    objective = MaskedSpanObjective(**settings).bind(tiny_tokenizer)
    return ExampleWriter(objective.prompt, token_bytes, (Phase(),), seed=0, objective=objective)


def test_an_example_may_be_asked_by_an_objective(tiny_tokenizer, token_bytes: TokenBytes) -> None:
    """Then its prompt is that of the objective's tasks, and its answer is the right one."""
    mark = Mark(start=3, end=7, fields={"depth": 1}, thought=" one more of it")
    document = Document(doc_id="d", text="Two and two is four.", marks=(mark,))
    writer = asked_by(tiny_tokenizer, token_bytes)
    (example,) = writer.write(document, step=0)
    assert token_bytes.join(example.prompt_ids) == b"Two ____ two is four.<think>"
    end = token_bytes[tiny_tokenizer.eos_token_id]
    assert token_bytes.join(example.target_ids) == b" one more of it</think>\\boxed{and}" + end


def test_a_mark_that_the_objective_does_not_ask_for_is_refused(
    tiny_tokenizer, token_bytes: TokenBytes
) -> None:
    # The document's mark is two words.
    with pytest.raises(
        ValueError, match=r"--data.objective MaskedSpanObjective: .* ' is four' that sum marks"
    ):
        asked_by(tiny_tokenizer, token_bytes).write(DOCUMENT, step=0)
    # There is nothing behind the text.
    document = Document(doc_id="d", text="Two and", marks=(Mark(start=3, end=7, thought="x"),))
    with pytest.raises(ValueError, match=r"set the objective so that its answer is a mark's text"):
        asked_by(tiny_tokenizer, token_bytes).write(document, step=0)
