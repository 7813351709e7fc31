"""Small tokenizers of each kind, trained in a moment on a few lines."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LINES = [
    "The sum of two even numbers is even, and so is the sum of two odd numbers.",
    "Let \\boxed{x} be { the smallest } number with x^2 + 2 = 4.",
    "naïve café 漢字 😀 – think </think> <think> end",
    "def f(x):\n    return {1: 'a', 2: [x]}\n",
] * 3
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _finished(
    backend: Tokenizer, *, think_tokens: bool, chat_template: str | None
) -> PreTrainedTokenizerFast:
    specials = [
        AddedToken(token, special=True, normalized=False)
        for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    backend.add_special_tokens(specials)
    if think_tokens:  # as in Qwen 3: separate tokens that are not declared special
        backend.add_tokens(
            [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", chat_template=chat_template
    )


@cache
def byte_level(
    *, think_tokens: bool = False, chat_template: str | None = CHAT_TEMPLATE, add_prefix_space: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer of GPT-2's kind, with additions of real ones.

    They are Qwen's NFC, GPT-NeoX's runs of spaces as added tokens, and an optional prefix space.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken("  ", special=False), AddedToken("   ", special=False)])
    return _finished(backend, think_tokens=think_tokens, chat_template=chat_template)


@cache
def with_missing_bytes() -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer that has only the bytes of its training text, like SmolLM2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return _finished(backend, think_tokens=False, chat_template=None)


@cache
def byte_fallback(*, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """Train a tokenizer of Llama 2's kind.

    It has a prepended space, U+2581 for spaces, <0xNN> for bytes outside the vocabulary, and a token that
    begins every text.
    """
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!▁)(?=▁)"), "isolated")
    fallback_pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=fallback_pieces, limit_alphabet=60, show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    # The trainer makes added tokens of all pieces that it must keep. Real tokenizers do so only for the
    # markers.
    specification = json.loads(backend.to_str())
    specification["added_tokens"] = [
        token for token in specification["added_tokens"] if token["content"] in ("<unk>", "<s>")
    ]
    backend = Tokenizer.from_str(json.dumps(specification))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = _finished(backend, think_tokens=False, chat_template=None)
    tokenizer.bos_token = "<s>"
    return tokenizer


@cache
def word_pieces() -> PreTrainedTokenizerFast:
    """Train a tokenizer of BERT's kind, whose tokens have no exact bytes."""
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=backend)
