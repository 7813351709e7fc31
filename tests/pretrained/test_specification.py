"""Tokenizers have the same hash if they behave alike, and different hashes if any part of them differs."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import toy_tokenizers as toys
from tokenizers import Tokenizer

from rpt_lightning.pretrained.specification import (
    canonical,
    earlier_tokenizer_hash,
    has_hash,
    specification,
    tokenizer_hash,
)

BASE = toys.byte_level(think_tokens=True)


def changed(change):
    content = copy.deepcopy(specification(BASE))
    change(content)
    tokenizer = copy.deepcopy(BASE)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


DIFFERENT = {
    "normalizer": lambda c: c.update(normalizer=None),
    "another normalizer": lambda c: c.update(normalizer={"type": "NFKC"}),
    "pre-tokenizer": lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False),
    "prefix space": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    "decoder": lambda c: c.update(decoder={"type": "BPEDecoder", "suffix": "</w>"}),
    "merges": lambda c: c["model"]["merges"].pop(),
    "ignore_merges": lambda c: c["model"].update(ignore_merges=True),
    "byte_fallback": lambda c: c["model"].update(byte_fallback=True),
    "added token": lambda c: c["added_tokens"].pop(),
    "flag of an added token": lambda c: c["added_tokens"][-1].update(lstrip=True),
}
SAME = {
    "nothing": lambda c: None,
    "offsets": lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(trim_offsets=False),
    "decoder's options": lambda c: c["decoder"].update(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    ),
    "nested": lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [c["pre_tokenizer"]]}),
    "truncation": lambda c: c.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    ),
    "empty prefix": lambda c: c["model"].update(continuing_subword_prefix="", end_of_word_suffix=""),
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_every_part_counts(change) -> None:
    assert tokenizer_hash(changed(change)) != tokenizer_hash(BASE)


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_decides_neither_ids_nor_text_does_not_count(change) -> None:
    assert tokenizer_hash(changed(change)) == tokenizer_hash(BASE)


def test_a_call_does_not_change_it() -> None:
    tokenizer = copy.deepcopy(BASE)
    before = tokenizer_hash(tokenizer)
    tokenizer("some text", truncation=True, max_length=2)
    assert specification(tokenizer)["truncation"] is not None
    assert tokenizer_hash(tokenizer) == before


def test_hashes_of_both_versions_are_recognised() -> None:
    """The earlier hash covered neither normaliser nor pre-tokeniser. A mark tells a stored hash's version."""
    other = changed(DIFFERENT["normalizer"])
    assert earlier_tokenizer_hash(other) == earlier_tokenizer_hash(BASE)
    assert has_hash(other, earlier_tokenizer_hash(BASE))
    assert has_hash(BASE, tokenizer_hash(BASE))
    assert not has_hash(other, tokenizer_hash(BASE))
    assert not has_hash(BASE, "0" * 16)


def test_the_earlier_hash_is_what_it_was() -> None:
    """The tokenizer is written out here, and its hash was computed by the earlier code."""
    content = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    backend = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": None,
                "post_processor": None,
                "decoder": None,
                "model": content,
            }
        )
    )
    tokenizer = type(BASE)(tokenizer_object=backend)
    tokenizer._tokenizer = backend
    canonical_text = json.dumps(["BPE", {"a": 0, "b": 1, "ab": 2}, [["a", "b"]], []], sort_keys=True)
    assert earlier_tokenizer_hash(tokenizer) == hashlib.sha256(canonical_text.encode()).hexdigest()[:16]


def test_canonical_form_by_hand() -> None:
    content = {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": ["a b"],
            "dropout": 0.0,
            "unk_token": None,
            "fuse_unk": True,
        },
        "added_tokens": [],
    }
    assert canonical(content) == {
        "normalizer": [{"type": "NFC"}],
        "pre_tokenizer": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
        "decoder": [{"type": "ByteLevel"}],
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "b": 1, "ab": 2},
            "merges": [["a", "b"]],
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
        },
        "added_tokens": [],
    }
