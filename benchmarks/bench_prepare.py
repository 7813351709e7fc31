"""Compare tokens/s of scoring a corpus with a proxy with a bare forward pass over the same padded batches.

    python benchmarks/bench_prepare.py

The reference is `model(input_ids=..., use_cache=False)` of the same model in inference mode. It runs the
body, and the head on every position including padding. Nothing is read from its logits. Scoring adds the
entropy, rank and candidates of each position, and saves the head on padding. Its limit is the FLOPs of the
two, without attention, which is the same for both. Both include padding, and the benchmark prints its share.
The proxy is a random model of SmolLM2-135M's size. The documents are as long as docstrings (60 to 256 tokens)
or fill windows of 1,024.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from models import SMOLLM2_135M
from numpy.typing import NDArray
from result import alternate, store
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rpt_lightning.data.prepare.proxy_scores import ProxyScorer
from rpt_lightning.training.cpu_precision import bf16_is_slow

WINDOW = 1024
AUTOCAST: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "32-true": nullcontext,
    "bf16-mixed": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
}
TINY = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def make_documents(kind: str, num: int, vocabulary: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(60, 257, num) if kind == "docstrings" else np.full(max(1, num // 8), WINDOW + 1)
    return [rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths]


def padded_batches(scorer: ProxyScorer, documents: list[NDArray[np.int32]]) -> list[torch.Tensor]:
    """Return the input of each forward pass that the scorer makes."""
    batches = []
    for batch in scorer._batches(documents):
        ids = torch.zeros(len(batch), max(window.stop - window.start for window in batch), dtype=torch.int64)
        for row, window in enumerate(batch):
            ids[row, : window.stop - window.start] = torch.from_numpy(
                documents[window.document][window.start : window.stop].astype(np.int64)
            )
        batches.append(ids)
    return batches


@torch.inference_mode()
def bare_forward(
    model: PreTrainedModel, batches: list[torch.Tensor], autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    for ids in batches:
        with autocast():
            model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def check(model: PreTrainedModel, scorer: ProxyScorer, document: NDArray[np.int32]) -> None:
    """Check that both sides compute the same before they are timed."""
    ids = torch.from_numpy(document.astype(np.int64))
    with scorer.autocast():
        probs = model(input_ids=ids[None, :-1], use_cache=False).logits[0].double().softmax(-1)
    expected = probs.gather(1, ids[1:, None])[:, 0].numpy()
    np.testing.assert_allclose(scorer.score([document])[0].true_prob[1:], expected, rtol=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--documents", type=int, default=48, help="Number of docstrings. There are an eighth as many windows."
    )
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=2048,
        help="Tokens in a batch, as in configs/prepare/demo-text.yaml.",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--precisions", nargs="+", choices=AUTOCAST, default=["32-true"] if bf16_is_slow() else list(AUTOCAST)
    )
    parser.add_argument("--short", action="store_true", help="Run a tiny model and store nothing.")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**(TINY if args.short else SMOLLM2_135M), attn_implementation="sdpa")
    ).eval()
    head = model.lm_head.weight.numel()
    body = model.num_parameters() - head  # the input embedding multiplies nothing
    if not model.config.tie_word_embeddings:
        body -= head
    if "bf16-mixed" not in args.precisions:
        print(
            "bf16-mixed is not measured: this CPU has no fast bf16 products (--precisions bf16-mixed "
            "measures it anyway)"
        )
    for precision in args.precisions:
        scorer = ProxyScorer(
            model, window=WINDOW, overlap=128, batch_tokens=args.batch_tokens, autocast=AUTOCAST[precision]
        )
        for kind in ("docstrings", "windows"):
            documents = make_documents(kind, args.documents, model.config.vocab_size)
            check(model, scorer, documents[0])
            batches = padded_batches(scorer, documents)
            padded, scored = sum(ids.numel() for ids in batches), sum(len(ids) - 1 for ids in documents)
            print(
                f"{kind}, {precision}: {scored:,} positions in {len(batches)} batches, "
                f"{1 - scored / padded:.1%} padding",
                flush=True,
            )
            seconds = alternate(
                {
                    "scoring": partial(scorer.score, documents),
                    "bare forward": partial(bare_forward, model, batches, AUTOCAST[precision]),
                },
                args.repeats,
            )
            print(
                "  " + ", ".join(f"{name}: {scored / value:,.0f} tokens/s" for name, value in seconds.items())
            )
            store(
                f"prepare-vs-forward-{kind}-{precision}", seconds["bare forward"] / seconds["scoring"],
                limit=(body + head) * padded / (body * padded + head * scored), target=0.8,
                unit="times the tokens/s of a bare forward pass", keep=not args.short,
            )  # fmt: skip


if __name__ == "__main__":
    main()
