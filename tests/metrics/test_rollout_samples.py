from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.records.rollout_samples import (
    RolloutSample,
    read_samples,
    sample_files,
    samples_of,
    text_pieces,
    write_samples,
)
from rpt_lightning.types import Completion, RolloutGroup, TokenTask

SAMPLE = RolloutSample(
    task_id="a:3",
    context="one\u2028two",  # a line separator that JSON does not escape
    truth=(" 4", "."),
    thought="hm",
    completion="hm\\boxed{ 4}",
    prediction=" 4",
    reward=1.0,
    finish_reason="stop",
    policy_version=2,
    tokens=("hm", "\\boxed{", " 4", "}", "<end>"),
    logprobs=(-0.5, -0.1, -1.25, -0.0, -0.3),
    entropy=1.2,
)


@given(st.lists(st.binary(max_size=5), max_size=8))
def test_pieces_joined_are_the_text(tokens):
    pieces = text_pieces(tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == b"".join(tokens).decode(errors="replace")


def test_a_character_belongs_to_the_token_that_completes_it():
    rocket = "🚀".encode()
    assert text_pieces([b"go ", rocket[:1], rocket[1:3], rocket[3:] + b"!", b"\xff"]) == (
        "go ",
        "",
        "",
        "🚀!",
        "�",
    )
    assert text_pieces([b"end", rocket[:2]]) == ("end", "�")  # the text ends inside a character


def test_what_is_written_is_read(tmp_path):
    samples = [SAMPLE, replace(SAMPLE, prediction=None, reward=0.0, finish_reason="length")]
    path = tmp_path / "rollouts" / "step-000012.jsonl"
    write_samples(samples, path)
    assert read_samples(path) == samples
    assert [sample.is_truncated for sample in read_samples(path)] == [False, True]
    write_samples([], path.with_name("step-000002.jsonl"))
    assert list(sample_files(tmp_path)) == [2, 12]
    assert sample_files(tmp_path / "none") == {}


def test_a_file_of_an_earlier_version_has_no_tokens(tmp_path):
    row = {
        name: value for name, value in asdict(SAMPLE).items() if name not in ("tokens", "logprobs", "entropy")
    }
    path = tmp_path / "step-000001.jsonl"
    path.write_text(json.dumps(row | {"of_a_later_version": 1}) + "\n")
    assert read_samples(path) == [replace(SAMPLE, tokens=None, logprobs=None, entropy=None)]


@pytest.mark.parametrize("line", ['{"task_id": "a:3"}', '{"task_', "[1]"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "step-000001.jsonl"
    path.write_text(json.dumps(asdict(SAMPLE)) + "\n" + line)
    with pytest.raises(
        ValueError,
        match=(
            r"step-000001\.jsonl line 2: not a rollout .* Expected one JSON object with task_id, context, "
            "truth"
        ),
    ):
        read_samples(path)


def test_samples_of_a_group(tiny_tokenizer):
    token_bytes = TokenBytes(tiny_tokenizer)
    task = TokenTask(
        task_id="a:3", doc_id="a", position=3, context_ids=(1, 2, 3), continuation_ids=(5, 6),
        continuation=(b"\xc3", b"\xa9"), entropy=1.5,
        true_prob=0.2, true_rank=1, answerable=True,
    )  # fmt: skip
    texts = ["why</think>\\boxed{no}\\boxed{e}", "no box"]
    completions = []
    for text in texts:
        ids = token_bytes.encode_plain(text)
        logprobs = tuple(-0.12345 for _ in range(len(ids) + 1))
        completions.append(
            Completion(
                token_ids=(*ids, tiny_tokenizer.eos_token_id), text_bytes=text.encode(),
                rollout_logprobs=logprobs, policy_version=4, finish_reason="stop",
            )
        )  # fmt: skip
    group = RolloutGroup(
        task=task,
        prompt_ids=(1, 2, 3),
        completions=tuple(completions),
        predictions=(b"e\xc3", None),
        rewards=(1.0, 0.0),
        truth=task.continuation,
    )
    first, second = samples_of(group, context="caf", token_bytes=token_bytes)
    assert first.truth == ("", "é")
    assert (first.thought, first.prediction, first.reward) == ("why</think>\\boxed{no}", "e�", 1.0)
    assert "".join(first.tokens) == texts[0] + tiny_tokenizer.eos_token
    assert set(first.logprobs) == {-0.123}
    assert len(first.logprobs) == len(first.tokens)
    assert (second.thought, second.prediction, second.entropy) == ("no box", None, 1.5)


def test_a_drawn_row_that_is_no_token_is_shown_as_such(tiny_tokenizer):
    """Embeddings are often padded beyond the vocabulary, and a weak policy draws tokens from there."""
    task = TokenTask(
        task_id="a:3", doc_id="a", position=3, context_ids=(1, 2, 3), continuation_ids=(5,),
        continuation=(b"x",), entropy=1.5, true_prob=0.2,
        true_rank=1, answerable=True,
    )  # fmt: skip
    beyond = Completion(
        token_ids=(10**6,), text_bytes=b"", rollout_logprobs=(-1.0,), policy_version=4, finish_reason="length"
    )
    group = RolloutGroup(
        task=task, prompt_ids=(1,), completions=(beyond,), predictions=(None,), rewards=(0.0,)
    )
    (sample,) = samples_of(group, context="", token_bytes=TokenBytes(tiny_tokenizer))
    assert sample.tokens == ("\ufffd",)
