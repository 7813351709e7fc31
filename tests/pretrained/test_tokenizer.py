"""A tokenizer loaded from a folder does what its tokenizer.json says, or loading raises a single error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toy_tokenizers as toys
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config

from rpt_lightning.data.prepare.proxy_model import load_tokenizer
from rpt_lightning.pretrained.specification import tokenizer_hash
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.pretrained.tokenizer import check_vocabulary

TEXT = "hello world  1 of 22 café\n x"


def folder_of(tokenizer, folder: Path, config=None, **tokenizer_config: object) -> Path:
    tokenizer.save_pretrained(folder)
    if config is not None:
        config.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | tokenizer_config))
    return folder


def edited(folder: Path, **changes: object) -> Path:
    """Change parts of tokenizer.json. Names that begin with ``model_`` change parts of its model."""
    content = json.loads((folder / "tokenizer.json").read_text())
    for name, value in changes.items():
        part, key = (
            (content["model"], name.removeprefix("model_")) if name.startswith("model_") else (content, name)
        )
        part[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def own_split():
    """Make a byte-level tokenizer with a different split pattern from Qwen 2's."""
    tokenizer = toys.byte_level(think_tokens=True)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    split = pre_tokenizers.Split(Regex(r"\d{1,2}|\s+|\w+|[^\s\w]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return type(tokenizer)(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=toys.CHAT_TEMPLATE
    )


@pytest.mark.parametrize(
    ("make", "config", "tokenizer_class"),
    [
        (toys.byte_level, LlamaConfig(), "LlamaTokenizerFast"),  # R1-Distill-Llama in a copied folder
        (toys.byte_level, None, "LlamaTokenizerFast"),
        (toys.byte_level, LlamaConfig(), "GPT2Tokenizer"),
        (own_split, Qwen2Config(), "Qwen2Tokenizer"),
        (own_split, Qwen2Config(), "TokenizersBackend"),
    ],
    ids=["llama", "llama without config", "gpt2", "qwen2", "qwen2 by any class"],
)
def test_a_class_of_another_family_is_repaired(make, config, tokenizer_class: str, tmp_path: Path) -> None:
    folder = folder_of(make(), tmp_path / "model", config, tokenizer_class=tokenizer_class)
    wanted = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    # Otherwise there is nothing to repair.
    assert tokenizer_hash(AutoTokenizer.from_pretrained(folder)) != tokenizer_hash(make())
    loaded = load_tokenizer(str(folder), flag="--tokenizer")
    assert loaded(TEXT, add_special_tokens=False).input_ids == wanted
    assert loaded.decode(wanted) == TEXT
    assert TokenBytes(loaded).join(TokenBytes(loaded).encode_plain(TEXT)) == TEXT.encode()
    assert tokenizer_hash(loaded) == tokenizer_hash(make())
    assert (loaded.eos_token, bool(loaded.chat_template)) == ("<|endoftext|>", True)


def test_what_is_right_is_left_as_transformers_makes_it(tmp_path: Path) -> None:
    folder = folder_of(toys.byte_level(think_tokens=True), tmp_path / "model")
    assert type(load_tokenizer(str(folder), flag="--tokenizer")) is type(
        AutoTokenizer.from_pretrained(folder)
    )


def test_random_merges_are_refused(tmp_path: Path) -> None:
    folder = edited(folder_of(toys.byte_level(), tmp_path / "model"), model_dropout=0.3)
    with pytest.raises(
        ValueError, match=r"^--tokenizer '.*model': .*tokenizer\.json drops merges at random \(dropout 0\.3\)"
    ):
        load_tokenizer(str(folder), flag="--tokenizer")


def test_another_id_in_the_config_is_refused(tmp_path: Path) -> None:
    token = {
        "content": "<think>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": False,
    }
    folder = folder_of(
        toys.byte_level(think_tokens=True), tmp_path / "model", added_tokens_decoder={"900": token}
    )
    with pytest.raises(
        ValueError,
        match=r"tokenizer_config\.json says that '<think>' has the id 900, and the tokenizer gives it \d+",
    ):
        load_tokenizer(str(folder), flag="--tokenizer")


@pytest.mark.parametrize("content", ["", "{", '{"model": {"type": "BPE"}}', "[1, 2]"])
def test_a_file_that_cannot_be_read_is_one_error(content: str, tmp_path: Path) -> None:
    folder = folder_of(toys.byte_level(), tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"^--tokenizer '.*model': ") as refusal:
        load_tokenizer(str(folder), flag="--tokenizer")
    assert "\n" not in str(refusal.value)


def with_tokens(tokens, *, special: bool = False):
    tokenizer = AutoTokenizer.from_pretrained(with_tokens.folder)
    tokenizer.add_tokens(tokens, special_tokens=special)
    return tokenizer


def test_tokens_without_an_embedding_are_refused(tiny_model_dir: Path) -> None:
    with_tokens.folder = tiny_model_dir
    check_vocabulary(with_tokens([]), 512, where="policy.path=p")
    with pytest.raises(
        ValueError,
        match=r"^policy\.path=p: .* 2 tokens without a row .*"
        r"\('<a>', '<b>', id 512 and up; vocab_size is 512\)",
    ):
        check_vocabulary(with_tokens(["<a>", "<b>"]), 512, where="policy.path=p")
    # A marker that nothing uses does no harm, such as Gemma 3's for images. One that the chat template or the
    # end of a text uses does.
    marker = with_tokens(["<image>"], special=True)
    check_vocabulary(marker, 512, where="policy.path=p")
    marker.chat_template = "{{ '<image>' }}"
    with pytest.raises(ValueError, match="'<image>', id 512"):
        check_vocabulary(marker, 512, where="policy.path=p")
