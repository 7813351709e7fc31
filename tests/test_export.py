from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpt_lightning.export import export
from rpt_lightning.policy.model import Policy
from rpt_lightning.pretrained.specification import earlier_tokenizer_hash
from rpt_lightning.training.checkpoint import reader as checkpoint_file
from rpt_lightning.training.modules.ntp_module import NTPModule

TOKENS = torch.tensor([[5, 6, 7, 300]])


@pytest.fixture
def module(tiny_model_dir: Path) -> NTPModule:
    """A module whose policy moved away from the tiny model on disk."""
    module = NTPModule(policy=Policy(str(tiny_model_dir)))
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.policy.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.fixture
def trained(module: NTPModule):
    return module.policy.model


@pytest.fixture
def checkpoint(module: NTPModule) -> dict[str, Any]:
    """The contents of a Lightning checkpoint, as far as export reads them."""
    content: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "optimizer_states": [{"unused": torch.zeros(3)}],
    }
    module.on_save_checkpoint(content)
    return content


def save(content: object, path: Path) -> str:
    torch.save(content, path)
    return str(path)


def test_the_folder_computes_what_the_policy_computed(
    checkpoint, trained, tiny_model_dir: Path, tmp_path: Path
):
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "new" / "hf"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "hf")
    torch.testing.assert_close(exported(TOKENS).logits, trained(TOKENS).logits, rtol=0, atol=0)
    assert exported.lm_head.weight.data_ptr() == exported.model.embed_tokens.weight.data_ptr()
    start = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert (exported(TOKENS).logits - start(TOKENS).logits).abs().max() > 0.1


def export_with_generation_config(text: str, checkpoint, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Export a policy whose start has this generation_config.json, and return that start."""
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    (source / "generation_config.json").write_text(text)
    checkpoint["rpt"]["policy_path"] = str(source)
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    return source


def test_the_tokenizer_and_the_end_tokens_come_along(checkpoint, tiny_model_dir: Path, tmp_path: Path):
    source = export_with_generation_config('{"eos_token_id": [0, 1]}', checkpoint, tiny_model_dir, tmp_path)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(source)
    assert ours("Sum of x_{2} </think>é\n")["input_ids"] == theirs("Sum of x_{2} </think>é\n")["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == [0, 1]


def test_sampling_defaults_that_contradict_themselves_are_kept_as_they_are(
    checkpoint, tiny_model_dir: Path, tmp_path: Path
):
    export_with_generation_config(
        '{"temperature": 0.6, "do_sample": false, "eos_token_id": 1}', checkpoint, tiny_model_dir, tmp_path
    )
    written = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert (written["temperature"], written["eos_token_id"]) == (0.6, 1)


def test_a_tied_head_may_be_absent(checkpoint, trained, tmp_path: Path):
    del checkpoint["state_dict"]["policy.model.lm_head.weight"]
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(TOKENS).logits,
        trained(TOKENS).logits,
        rtol=0,
        atol=0,
    )


def test_dtype_is_what_was_asked_for(checkpoint, trained, tmp_path: Path):
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"), dtype="bfloat16")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert exported.dtype == torch.bfloat16
    torch.testing.assert_close(exported.lm_head.weight, trained.lm_head.weight.bfloat16(), rtol=0, atol=0)


def test_an_existing_output_is_left_alone(checkpoint, tmp_path: Path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match=r"--output .*hf: exists already"):
        export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    assert not list((tmp_path / "hf").iterdir())


def test_what_is_not_our_checkpoint_is_named(checkpoint, tmp_path: Path):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").touch()
    whole = Path(save(checkpoint, tmp_path / "whole.ckpt")).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    save({"state_dict": {}}, tmp_path / "other.ckpt")
    save(Path, tmp_path / "class.ckpt")  # would be unpickled by code: refused by weights_only
    norm = "policy.model.model.norm.weight"
    weights = checkpoint["state_dict"]
    save(
        {**checkpoint, "state_dict": {name: tensor for name, tensor in weights.items() if name != norm}},
        tmp_path / "short.ckpt",
    )
    save({**checkpoint, "state_dict": {**weights, norm: torch.zeros(3)}}, tmp_path / "misshapen.ckpt")
    save(
        {**checkpoint, "rpt": {**checkpoint["rpt"], "policy_path": str(tmp_path / "gone")}},
        tmp_path / "moved.ckpt",
    )

    for name, message in {
        "missing.ckpt": "no such file",
        "": "no such file",
        "text.ckpt": "not a checkpoint that can be read",
        "empty.ckpt": "not a checkpoint that can be read",
        "cut.ckpt": "not a checkpoint that can be read",
        "class.ckpt": "not a checkpoint that can be read",
        "other.ckpt": "not a checkpoint of `rpt fit`",
        "short.ckpt": r"1 tensors are missing \['model.norm.weight'\]",
        "misshapen.ckpt": "do not have the shapes",
        "moved.ckpt": "gone, which cannot be loaded",
    }.items():
        with pytest.raises(ValueError, match=message):
            export(str(tmp_path / name), str(tmp_path / "hf"))
        assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob(".hf.*"))


def test_shards_are_put_together(checkpoint, trained, tmp_path: Path):
    """Lightning's sharded checkpoints: torch's distributed checkpoint, with the rest in meta.pt."""
    folder = tmp_path / "step-000001.ckpt"
    weights = checkpoint.pop("state_dict")
    optimizer = {"exp_avg": torch.zeros(3)}
    torch.distributed.checkpoint.save(
        {"state_dict": weights, "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True
    )
    save(checkpoint, folder / "meta.pt")
    export(str(folder), str(tmp_path / "hf"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(exported(TOKENS).logits, trained(TOKENS).logits, rtol=0, atol=0)


def test_never_more_than_one_file_is_in_memory(checkpoint, trained, tmp_path: Path, monkeypatch):
    """Shards of an untied, bf16 export, in files of at most 200 kB."""
    folder = tmp_path / "step-000001.ckpt"
    torch.distributed.checkpoint.save(
        {"state_dict": checkpoint.pop("state_dict")}, checkpoint_id=folder, no_dist=True
    )
    save(checkpoint, folder / "meta.pt")
    loaded, load = [], checkpoint_file.load

    def counting(weights, **options):
        loaded.append(sum(tensor.nbytes for tensor in weights.values()))
        return load(weights, **options)

    monkeypatch.setattr(checkpoint_file, "load", counting)
    monkeypatch.setattr("rpt_lightning.export.MAX_FILE_SIZE", "200KB")
    export(str(folder), str(tmp_path / "hf"), dtype="bfloat16")
    assert len(loaded) == len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 5
    assert max(loaded) <= 2 * 200_000  # fp32 on the way to bf16
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert exported.dtype == torch.bfloat16
    for name, weight in trained.state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight.bfloat16()), name


def test_another_tokenizer_in_the_models_folder_is_refused(checkpoint, tiny_model_dir: Path, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_dir, source)
    checkpoint["rpt"]["policy_path"] = str(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(source)
    with pytest.raises(ValueError, match="source, now has another tokenizer than in training"):
        export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


def test_the_tokenizers_own_files_are_copied(checkpoint, tiny_model_dir: Path, tmp_path: Path):
    """Byte for byte, except for the class's name, which transformers 4 does not know."""
    source = Path(shutil.copytree(tiny_model_dir, tmp_path / "source"))
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    settings = json.loads((source / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    checkpoint["rpt"]["policy_path"] = str(source)
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    written = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert written == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_a_tokenizer_that_was_repaired_is_exported_right_for_all_readers(
    checkpoint, tiny_model_dir: Path, tmp_path: Path
):
    """The class that the folder names belongs to another family.

    AutoTokenizer loses the spaces of texts with the source, but not with the exported folder.
    """
    source = Path(shutil.copytree(tiny_model_dir, tmp_path / "source"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "LlamaTokenizerFast"})
    )
    broken = AutoTokenizer.from_pretrained(source)
    assert broken.decode(broken.encode("hello world  1")) == "helloworld1"
    checkpoint["rpt"]["policy_path"] = str(source)
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.decode(exported.encode("hello world  1")) == "hello world  1"


def test_a_checkpoint_of_before_is_exported_by_its_earlier_hash(checkpoint, module, tmp_path: Path):
    checkpoint["rpt"]["tokenizer_hash"] = earlier_tokenizer_hash(module.tokenizer)
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    module.on_load_checkpoint({"rpt": checkpoint["rpt"]})  # and resumed


def test_rotary_frequencies_stand_under_their_older_names_too(checkpoint, tmp_path: Path):
    """transformers 4.57 does not know rope_parameters and would compute with 10,000."""
    config = json.loads(checkpoint["rpt"]["policy_config"])
    config["rope_parameters"]["rope_theta"] = 1000000.0
    checkpoint["rpt"]["policy_config"] = json.dumps(config)
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1000000.0
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.rope_parameters["rope_theta"]
        == 1000000.0
    )


def test_weights_that_are_not_finite_are_refused_by_name(checkpoint, tmp_path: Path):
    weights = checkpoint["state_dict"]
    norm, query = "policy.model.model.norm.weight", "policy.model.model.layers.1.self_attn.q_proj.weight"
    for name, dtype, value, message in [
        (
            norm,
            "float32",
            float("nan"),
            r"as float32, 1 \(model\.norm\.weight\) of its weights hold NaN or infinity; "
            r"export an earlier checkpoint",
        ),
        (query, "bfloat16", float("inf"), r"as bfloat16, 1 \(model\.layers\.1\.self_attn\.q_proj\.weight\) "),
        (
            norm,
            "float16",
            70000.0,
            r"as float16, 1 \(model\.norm\.weight\) .*give --dtype float32 or bfloat16",
        ),
    ]:
        damaged = weights[name].clone()
        damaged.view(-1)[3] = value
        path = save({**checkpoint, "state_dict": {**weights, name: damaged}}, tmp_path / "damaged.ckpt")
        with pytest.raises(ValueError, match=rf"^--ckpt {path}: {message}"):
            export(path, str(tmp_path / "hf"), dtype=dtype)
        assert not (tmp_path / "hf").exists()


def test_a_flipped_bit_is_refused(checkpoint, tmp_path: Path):
    path = Path(save(checkpoint, tmp_path / "last.ckpt"))
    content = bytearray(path.read_bytes())
    weight = checkpoint["state_dict"]["policy.model.model.layers.1.mlp.up_proj.weight"]
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^--ckpt {path} is not a whole checkpoint: its part .* does not have its checksum"
    ):
        export(str(path), str(tmp_path / "hf"))
    assert not (tmp_path / "hf").exists()


VLLM_LOGPROBS = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(
    sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64,
    logprobs_mode="processed_logprobs", seed=0,
)
params = SamplingParams(max_tokens=1, temperature=1.0, logprobs=0, seed=0)
(output,) = llm.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], params)
((token, logprob),) = output.outputs[0].logprobs[0].items()
print("RESULT", token, logprob.logprob)
"""


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_loads_the_folder(checkpoint, trained, tmp_path: Path):
    export(save(checkpoint, tmp_path / "last.ckpt"), str(tmp_path / "hf"))
    # A process of its own: vLLM takes over the threads and the seeds of the one it runs in.
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", VLLM_LOGPROBS, str(tmp_path / "hf"), json.dumps(TOKENS[0].tolist())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    token, logprob = line.split()[1:]
    ours = trained(TOKENS).logits[0, -1].log_softmax(-1)[int(token)]
    assert float(logprob) == pytest.approx(float(ours.detach()), abs=1e-3)
