from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rpt_lightning.policy.flops import ModelSize
from rpt_lightning.records.results import PositionResult, pair_results, read_results, write_results
from sample_results import FIRST, SECOND, results

SIZE = ModelSize(body_params=106, head_params=28, attention_width=17)


def test_read_gives_back_what_was_written(tmp_path: Path):
    written = results(FIRST, SECOND)
    write_results(written, tmp_path / "new" / "validation.jsonl")
    assert read_results(tmp_path / "new" / "validation.jsonl") == written


def test_an_interrupted_file_is_refused(tmp_path: Path):
    path = tmp_path / "v.jsonl"
    write_results(results(FIRST, SECOND), path)
    path.write_text(path.read_text().split("\n")[0] + "\n")
    with pytest.raises(ValueError, match=r"v\.jsonl: 1 positions, but v\.json says 2"):
        read_results(path)


def test_the_meta_file_says_whose_weights(tmp_path: Path):
    written = replace(
        results(FIRST), ckpt_path="runs/r/checkpoints/step-000007.ckpt", model_size=SIZE, temperature=0.8
    )
    write_results(written, tmp_path / "v.jsonl")
    meta = json.loads((tmp_path / "v.json").read_text())
    assert (meta.pop("ckpt_path"), meta.pop("temperature")) == ("runs/r/checkpoints/step-000007.ckpt", 0.8)
    assert meta.pop("model_size") == {
        "body_params": 106,
        "head_params": 28,
        "attention_width": 17,
        "frozen_body_params": 0,
        "head_is_frozen": False,
    }
    assert meta == {"policy_path": "models/p", "step": 7, "num_positions": 1}
    assert read_results(tmp_path / "v.jsonl") == written


def test_fields_of_the_corpus_come_last_and_are_read_again(tmp_path: Path):
    written = results(replace(FIRST, fields={"depth": 3, "share": 0.1, "world": "é"}), SECOND)
    write_results(written, tmp_path / "v.jsonl")
    assert read_results(tmp_path / "v.jsonl") == written
    assert [list(json.loads(line))[-1] for line in (tmp_path / "v.jsonl").read_text().split("\n")[:2]] == [
        "fields",
        "fields",
    ]
    assert hash(written.positions[0]) == hash(FIRST)


FIELDS_OF_NO_KIND = [
    json.dumps(asdict(FIRST) | {"fields": wrong})
    for wrong in ([1], "x", {"depth": [1]}, {"depth": True}, {"depth": None})
]


@pytest.mark.parametrize(
    "line", ["{", json.dumps({"task_id": "a:3"}), json.dumps({"unknown": 1}), "[]", *FIELDS_OF_NO_KIND]
)
def test_a_broken_line_is_named(tmp_path: Path, line: str):
    path = tmp_path / "v.jsonl"
    write_results(results(FIRST, SECOND), path)
    path.write_text(path.read_text().split("\n")[0] + "\n" + line + "\n")
    with pytest.raises(
        ValueError, match=r"v\.jsonl line 2: (not a position result|fields is .*, where an object)"
    ):
        read_results(path)


@pytest.mark.parametrize("missing", ["v.jsonl", "v.json"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str):
    write_results(results(FIRST), tmp_path / "v.jsonl")
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=rf"{missing}: no such file"):
        read_results(tmp_path / "v.jsonl")


def test_pairs_follow_the_first_whatever_the_order_of_the_second():
    better = replace(FIRST, reasoning_correct=True)
    assert pair_results(results(FIRST, SECOND), results(SECOND, better)) == [
        (FIRST, better),
        (SECOND, SECOND),
    ]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((FIRST,), r"2 positions\).*\(1\) are of different positions, for example 'b:9'"),
        ((FIRST, replace(SECOND, task_id="c:1")), "different positions, for example 'b:9'"),
        ((FIRST, FIRST), "occurs twice"),
        ((FIRST, replace(SECOND, truth="x")), "'b:9' has the truth"),
    ],
)
def test_other_positions_cannot_be_paired(other: tuple[PositionResult, ...], message: str):
    with pytest.raises(ValueError, match=message):
        pair_results(results(FIRST, SECOND), results(*other))


def test_files_of_earlier_versions_are_read(tmp_path: Path):
    path = tmp_path / "v.jsonl"
    write_results(results(FIRST), path)
    new = (
        "token_kind",
        "context_tokens",
        "prompt_tokens",
        "thought_length",
        "num_samples",
        "num_correct",
        "sampled_tokens",
        "fields",
    )
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in new})
        + "\n"
    )
    meta = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(
        json.dumps({name: meta[name] for name in ("policy_path", "step", "num_positions")})
    )
    assert read_results(path) == results(FIRST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"policy_path": "mod', r"v\.json: not JSON .*Run `rpt validate` again"),
        ("", r"v\.json: not JSON"),
        ("[1]", r"v\.json: not an object with policy_path, step, num_positions\. Run `rpt validate` again"),
        ('{"policy_path": "p", "step": 1}', r"v\.json: not an object with"),
        (
            '{"policy_path": "p", "step": 1, "num_positions": 1, "model_size": {"params": 3}}',
            r"v\.json: model_size \{'params': 3\} does not describe a model",
        ),
    ],
)
def test_a_broken_meta_file_is_named(tmp_path: Path, text: str, message: str):
    write_results(results(FIRST), tmp_path / "v.jsonl")
    (tmp_path / "v.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "v.jsonl")


def test_a_file_that_ends_inside_a_character_is_named(tmp_path: Path):
    write_results(results(SECOND), tmp_path / "v.jsonl")
    whole = (tmp_path / "v.jsonl").read_bytes()
    (tmp_path / "v.jsonl").write_bytes(whole[: whole.index("é".encode()) + 1])
    with pytest.raises(ValueError, match=r"v\.jsonl: not UTF-8"):
        read_results(tmp_path / "v.jsonl")


def test_the_meta_file_is_there_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_results(results(FIRST), tmp_path / "v.jsonl")
    before = (tmp_path / "v.json").read_text()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_results(results(FIRST, SECOND), tmp_path / "v.jsonl")
    assert (tmp_path / "v.json").read_text() == before
    with pytest.raises(ValueError, match=r"v\.jsonl: 2 positions, but v\.json says 1"):
        read_results(tmp_path / "v.jsonl")
