"""The table of docs/families.md: which model families a policy takes, and which of them each engine runs.

    python scripts/family_table.py run [--families phi gpt2 ...]
        Tries each family in its own process (half a minute each) and, if all are tried, writes the table.
    python scripts/family_table.py try phi
        Tries one family and prints its row as JSON.

The script makes a small random model of the family, which the policy and each engine read. The engine takes
the policy's weights twice, with a change in between, and says which of its tensors differ. Then its log-probs
of its own completions are compared with the policy's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from rpt_lightning.evaluation.marked_section import replace_section
from rpt_lightning.evaluation.tables.stages import markdown_row, markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGE, BEGIN, END = (
    ROOT / "docs" / "families.md",
    "<!-- made by scripts/family_table.py -->",
    "<!-- end of families -->",
)
WIDTH = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
GROUPED = WIDTH | {"intermediate_size": 96, "num_key_value_heads": 1}
HEADS = GROUPED | {"head_dim": 32}
GPT = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "gemma2": HEADS,
    "gemma3_text": HEADS,
    "phi": GROUPED,
    "phi3": GROUPED | {"pad_token_id": 0},
    "olmo2": GROUPED,
    "smollm3": GROUPED | {"pad_token_id": 0},
    "starcoder2": GROUPED,
    "stablelm": GROUPED,
    "granite": GROUPED,
    "cohere": GROUPED,
    "nemotron": GROUPED,
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 16},
    "gpt_neox": WIDTH | {"intermediate_size": 96},
    "opt": WIDTH | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": WIDTH,
    "mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": GROUPED
    | EXPERTS
    | {"num_experts": 4, "shared_expert_intermediate_size": 64, "decoder_sparse_step": 1},
    "qwen3_moe": HEADS | EXPERTS | {"num_experts": 4, "decoder_sparse_step": 1},
    "olmoe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
}
TOLERANCE = 1e-3  # nats, in fp32
WORKS, COLUMNS = "works", ("policy", "VLLMEngine", "HFEngine")


def make_model(family: str, folder: Path, tokenizer: Path) -> None:
    """Make a model without dropout, whose random weights differ from layers' initial values.

    Its tokenizer is that of the tiny model.
    """
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **FAMILIES[family])
    config.bos_token_id, config.eos_token_id = 0, 1
    for name, value in vars(config).items():
        if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder)


def try_family(family: str) -> dict[str, str]:
    """Return the family's row, whose cells say "works" or give the error."""
    from rpt_lightning.policy.model import Policy
    from rpt_lightning.rollout.engines.hf_engine import HFEngine
    from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine

    with tempfile.TemporaryDirectory() as at:
        tokenizer, folder = Path(at) / "tiny", Path(at) / family
        command = (sys.executable, ROOT / "scripts" / "make_model.py", "tiny", "--output", tokenizer)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        make_model(family, folder, tokenizer)
        row = {}
        try:
            policy = Policy(str(folder))
            policy.materialize()
            row["policy"] = "shares prefixes" if policy.shares_prefixes else "works, without sharing prefixes"
        except ValueError as error:
            return {"policy": _short(error, folder)}
        for engine in (
            VLLMEngine(dtype="float32", kv_cache_gib=0.1),
            HFEngine(dtype="float32", device="cpu"),
        ):
            try:
                row[type(engine).__name__] = _run(engine, policy, folder)
            except ValueError as error:
                row[type(engine).__name__] = _short(error, folder)
        return row


def _run(engine: Any, policy: Any, folder: Path) -> str:
    """Try a family on an engine. An error that is not caught here is a traceback for the user too."""
    import torch

    from rpt_lightning.policy.weights import named_weights
    from rpt_lightning.types import GenerationRequest, SamplingSettings, TrainSequence

    sampling = SamplingSettings(temperature=0.8, max_tokens=24, stop_token_ids=(1,))
    requests = [
        GenerationRequest(
            task_id=f"d:{i}",
            prompt_ids=tuple(range(40 + i, 60 + 3 * i)),
            n=2,
            seed=100 * i,
            sampling=sampling,
        )
        for i in range(3)
    ]
    largest = 0.0
    with engine:
        engine.start(str(folder), seed=0, max_model_len=128)
        for version in range(2):
            engine.update_weights(named_weights(policy), version=version)
            differing = engine.differing_weights(dict(named_weights(policy)))
            if differing:
                return f"WRONG: other weights than the policy's, {next(iter(differing.values()))[:3]}"
            for request, completions in zip(requests, engine.generate(requests), strict=True):
                for completion in completions:
                    sequence = TrainSequence(prompt_ids=request.prompt_ids, target_ids=completion.token_ids)
                    (tree,) = policy.pack([sequence], max_tokens=4096)
                    with torch.no_grad():
                        (logprobs,) = tree.unpack(policy(tree, temperature=0.8)[0])
                    largest = max(
                        largest, (logprobs - torch.tensor(completion.rollout_logprobs)).abs().max().item()
                    )
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return WORKS if largest <= TOLERANCE else f"WRONG: log-probs differ by {largest:.2g} nats"


def _short(error: Exception, folder: Path) -> str:
    text = " ".join(str(error).replace(str(folder), "MODEL").split()).replace("|", "/")
    return f"refused: {text[:150]}" + ("..." if len(text) > 150 else "")


def row_of(family: str) -> dict[str, str]:
    """Try a family in its own process, because vLLM leaves its settings behind."""
    done = subprocess.run((sys.executable, __file__, "try", family), capture_output=True, text=True)
    if done.returncode:
        return {"policy": f"TRACEBACK: {done.stderr.strip().splitlines()[-1][:150]}"}
    return cast(dict[str, str], json.loads(done.stdout.splitlines()[-1]))


def write_page(rows: dict[str, dict[str, str]]) -> None:
    """Write the table into docs/families.md, between its marks."""
    lines = [
        markdown_row(f"`{family}`", [row.get(column, "-") for column in COLUMNS])
        for family, row in rows.items()
    ]
    table = markdown_table("family (`model_type`)", list(COLUMNS), lines)
    text = replace_section(
        PAGE.read_text(encoding="utf-8"), f"{table}\n", begin=BEGIN, end=END, where=str(PAGE)
    )
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("try", help="try one family").add_argument("family", choices=list(FAMILIES))
    run = verbs.add_parser("run", help="try all families")
    run.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    run.add_argument("--jobs", type=int, default=1, help="families side by side")
    arguments = parser.parse_args()
    if arguments.verb == "try":
        print(json.dumps(try_family(arguments.family)))
        return
    rows = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for family, row in zip(arguments.families, pool.map(row_of, arguments.families), strict=True):
            rows[family] = row
            print(family, row, flush=True)
    if arguments.families == list(FAMILIES):
        write_page(rows)


if __name__ == "__main__":
    main()
