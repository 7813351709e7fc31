"""Runs that train an adapter: what is saved, resumed, exported and synced."""

from __future__ import annotations

import shutil

import pytest
import torch
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from small_run import quiet_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpt_lightning.compat.peft import part_names
from rpt_lightning.data.modules.base import StepLoader
from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.evaluation.policies import policy_source
from rpt_lightning.export import export
from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.policy.flops import model_size
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.weights import named_weights
from rpt_lightning.records.step_log import read_step_log
from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.rollout.weight_sync.weight_part import split_part, take
from rpt_lightning.training.callbacks.logs import StepLog
from rpt_lightning.training.checkpoint.callback import last_checkpoint
from rpt_lightning.training.checkpoint.reader import read_checkpoint
from rpt_lightning.training.engine_check.sync_check import SyncError
from rpt_lightning.training.modules.ntp_module import NTPModule
from rpt_lightning.types import TrainSequence

ADAPTER = Adapter(rank=4, alpha=8.0)
STEPS = 3


def fit(
    make_run,
    max_steps,
    run_dir,
    *,
    ckpt_path=None,
    adapter=ADAPTER,
    policy_options=None,
    micro=16384,
    **options,
):
    torch.manual_seed(0)
    trainer, module, data = make_run(
        max_steps,
        run_dir=run_dir,
        policy_options={"adapter": adapter, **(policy_options or {})},
        # The random model earns hardly any reward. The next-token term gives every step a gradient.
        module_options={"ntp_weight": 0.5, "micro_batch_tokens": micro},
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    assert trainer.global_step == max_steps
    return module


def flat(module):
    return torch.cat([parameter.detach().flatten() for _, parameter in module.policy.named_adapter()])


@pytest.fixture
def trained(make_run, tmp_path):
    module = fit(make_run, STEPS, tmp_path / "run")
    still = [name for name, value in module.policy.named_adapter() if not value.any()]
    assert not still, still
    return module


def test_a_resumed_run_is_the_uninterrupted_one(make_run, tmp_path):
    whole = flat(fit(make_run, STEPS, tmp_path / "whole", micro=200))
    for stop_at in (1, 2):
        folder = tmp_path / f"stopped-{stop_at}"
        fit(make_run, stop_at, folder, micro=200)
        torch.manual_seed(stop_at + 5)
        resumed = fit(make_run, STEPS, folder, ckpt_path=str(last_checkpoint(folder)), micro=200)
        assert torch.equal(flat(resumed), whole)


def test_results_do_not_depend_on_micro_batches(make_run, tmp_path):
    ends = [flat(fit(make_run, STEPS, tmp_path / str(tokens), micro=tokens)) for tokens in (16384, 150)]
    start = flat(fit(make_run, 1, tmp_path / "start"))
    assert (ends[0] - ends[1]).norm() < 1e-3 * (ends[0] - start).norm()


def test_a_checkpoint_holds_the_adapter_alone(trained, tmp_path, tiny_model_dir):
    path = last_checkpoint(tmp_path / "run")
    checkpoint = torch.load(path, weights_only=True)
    held = dict(trained.policy.named_adapter())
    assert {name.removeprefix("policy.model.") for name in checkpoint["state_dict"]} == set(held)
    (optimizer,) = checkpoint["optimizer_states"]
    assert len(optimizer["state"]) == len(held)
    num_adapter = sum(parameter.numel() for parameter in held.values())
    # Weights and two moments in fp32, and little else.
    assert 12 * num_adapter < path.stat().st_size < 12 * num_adapter + 500_000
    assert path.stat().st_size < (tiny_model_dir / "model.safetensors").stat().st_size
    about = checkpoint["rpt"]["adapter"]
    assert about["base"] == str(tiny_model_dir)
    assert about["base_hash"] == trained.policy.base_hash
    assert Adapter(**about["settings"]) == ADAPTER
    # The base has not moved.
    base = load_file(tiny_model_dir / "model.safetensors")
    layer = trained.policy.model.model.layers[0].mlp.up_proj.base_layer
    assert torch.equal(layer.weight, base["model.layers.0.mlp.up_proj.weight"])


def test_costs_count_no_gradients_of_frozen_weights(trained):
    size = model_size(trained.policy.model)
    assert size.head_is_frozen
    assert size.body_params - size.frozen_body_params == flat(trained).numel()


def test_exports_hold_what_the_engine_got(trained, tmp_path, tiny_model_dir):
    ckpt = str(last_checkpoint(tmp_path / "run"))
    export(ckpt, str(tmp_path / "merged"))
    export(ckpt, str(tmp_path / "adapter"), form="adapter")
    expected = dict(named_weights(trained.policy))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    for folder in ("merged", "adapter"):
        again = Policy(str(tmp_path / folder))
        again.materialize()
        assert all(torch.equal(weight, expected[name]) for name, weight in named_weights(again)), folder
    continued = Policy(str(tmp_path / "adapter"), adapter=ADAPTER)
    continued.materialize()
    for (name, ours), (_, theirs) in zip(
        continued.named_adapter(), trained.policy.named_adapter(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    export(ckpt, str(tmp_path / "half"), dtype="bfloat16", form="adapter")
    narrow = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}


def test_a_checkpoint_is_evaluated_as_it_is(trained, tmp_path, tiny_model_dir):
    ckpt = str(last_checkpoint(tmp_path / "run"))
    assert policy_source(ckpt) == (str(tiny_model_dir), ckpt, ADAPTER)
    path, _, adapter = policy_source(ckpt)
    module = NTPModule(Policy(path, adapter=adapter))
    trainer = quiet_trainer(tmp_path / "evaluated", 1, [])
    trainer.validate(module, [], ckpt_path=ckpt, weights_only=True, verbose=False)
    assert torch.equal(flat(module), flat(trained))


def change_base(tmp_path, tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_another_base_is_refused(make_run, tmp_path, tiny_model_dir):
    fit(make_run, 1, tmp_path / "run")
    ckpt = str(last_checkpoint(tmp_path / "run"))
    other = change_base(tmp_path, tiny_model_dir)
    with pytest.raises(ValueError, match=r"ckpt_path: the adapter was trained on weights with the hash"):
        fit(make_run, 2, tmp_path / "run", ckpt_path=ckpt, policy_options={"path": other})


def test_export_asks_for_the_base(make_run, tmp_path, tiny_model_dir):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    fit(make_run, 1, tmp_path / "run", policy_options={"path": str(base)})
    ckpt = str(last_checkpoint(tmp_path / "run"))
    other = change_base(tmp_path, tiny_model_dir)
    shutil.copyfile(f"{other}/model.safetensors", base / "model.safetensors")
    with pytest.raises(ValueError, match=r"--ckpt .*the adapter was trained on weights with the hash"):
        export(ckpt, str(tmp_path / "merged"))
    (base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"--ckpt .* has no safetensors files"):
        export(ckpt, str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    export(ckpt, str(tmp_path / "adapter"), form="adapter")  # needs no base


@pytest.mark.parametrize(
    ("saved", "given", "message"),
    [
        (ADAPTER, None, r"holds an adapter of .*; give --model.policy.adapter.rank 4"),
        (None, ADAPTER, r"holds all weights of a model, but the config has an adapter"),
        (ADAPTER, Adapter(rank=4, alpha=9.0), r"other settings; give --model.policy.adapter.alpha 8.0"),
        (
            ADAPTER,
            Adapter(rank=4, alpha=8.0, targets=["q_proj"]),
            r"other settings; give --model.policy.adapter.targets all-linear",
        ),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(make_run, tmp_path, saved, given, message):
    fit(make_run, 1, tmp_path / "run", adapter=saved)
    ckpt = str(last_checkpoint(tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        fit(make_run, 2, tmp_path / "run", adapter=given, ckpt_path=ckpt)
    if saved is None:
        with pytest.raises(ValueError, match=r"--form adapter: .* no adapter; leave --form out"):
            export(ckpt, str(tmp_path / "adapter"), form="adapter")


def test_a_damaged_entry_is_named(make_run, tmp_path):
    fit(make_run, 1, tmp_path / "run")
    path = last_checkpoint(tmp_path / "run")
    content = torch.load(path, weights_only=True)
    content["rpt"]["adapter"]["settings"]["rank"] = 0
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"entry 'rpt.adapter' is .* edited or is damaged"):
        export(str(path), str(tmp_path / "merged"))
    about = read_checkpoint(path, flag="--ckpt").about
    del about["adapter"]["base"]
    torch.save(content | {"rpt": about}, path)
    with pytest.raises(ValueError, match=r"entry 'rpt.adapter' is .* edited or is damaged"):
        policy_source(str(path))


def test_a_lost_tensor_is_not_overlooked(make_run, tmp_path):
    fit(make_run, 1, tmp_path / "run")
    path = last_checkpoint(tmp_path / "run")
    content = torch.load(path, weights_only=True)
    content["state_dict"].popitem()
    torch.save(content, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        fit(make_run, 2, tmp_path / "run", ckpt_path=str(path))


def test_an_engine_generates_with_the_merged_weights(make_run, tmp_path):
    """HFEngine is checked after every sync, by tensors and log-probs. A mismatch would end the run."""
    module = fit(make_run, STEPS, tmp_path / "run", engine=lambda: HFEngine(dtype="float32"))
    assert flat(module).abs().max() > 0


def test_an_engine_without_the_adapter_is_found(make_run, tmp_path, monkeypatch):
    from rpt_lightning.rollout.engines import model_copy

    load = model_copy.load_weights
    first = []

    def only_once(model, weights):
        if first:
            for _ in weights:
                pass
        else:
            load(model, weights)
            first.append(True)

    monkeypatch.setattr(model_copy, "load_weights", only_once)
    with pytest.raises(SyncError, match="compared tensors differ"):
        fit(make_run, STEPS, tmp_path / "run", engine=lambda: HFEngine(dtype="float32"))


class OneBatch(LightningDataModule):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def train_dataloader(self):
        return StepLoader(lambda: self.batch, num_steps=100)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


def test_next_token_training_moves_the_adapter_alone(tiny_model_dir, tmp_path):
    torch.manual_seed(0)
    module = NTPModule(Policy(str(tiny_model_dir), adapter=ADAPTER), lambda p: torch.optim.AdamW(p, lr=1e-2))
    batch = SequenceBatch(
        sequences=(
            TrainSequence(prompt_ids=(9, 8, 7), target_ids=(6, 5)),
            TrainSequence(prompt_ids=(9,), target_ids=(8, 7, 6, 5)),
        )
    )
    quiet_trainer(tmp_path / "run", 8, [StepLog()], enable_checkpointing=False).fit(module, OneBatch(batch))
    losses = [step["loss/total"] for step in read_step_log(tmp_path / "run" / "steps.jsonl").values()]
    assert losses[-1] < losses[0] - 0.5
    assert all(not parameter.requires_grad or parameter.abs().max() > 0 for parameter in module.parameters())


def test_a_base_in_bf16_needs_bf16_mixed(make_run, tmp_path):
    with pytest.raises(ValueError, match=r"base_dtype is bfloat16, but --trainer.precision is 32-true"):
        fit(make_run, 1, tmp_path / "run", adapter=Adapter(base_dtype="bfloat16"))


class BesideEngine(HFEngine):
    """Takes the adapter alone, as VLLMEngine does with ``max_adapter_rank``, and adds it to the base."""

    max_adapter_rank = 4
    forgets = None  # name of a tensor that it does not replace

    def __init__(self):
        super().__init__(dtype="float32")
        self.num_base_updates = 0
        self.versions = []
        self.held = {}

    def _update_weights(self, weights, version):
        self.num_base_updates += 1
        super()._update_weights(weights, version)
        parameters = self._model.named_parameters(remove_duplicate=False)
        self.base = {name: parameter.detach().clone() for name, parameter in parameters}

    def _update_adapter(self, adapter, version):
        self.versions.append(version)
        self.held = {name: self.held[name] if name == self.forgets else t for name, t in adapter.items()}
        for layer in {name.partition(".lora_")[0] for name in adapter}:
            a, scaled_b = (self.held[name] for name in part_names(layer))
            weight = self._model.get_parameter(f"{layer}.weight")
            weight.data = self.base[f"{layer}.weight"] + scaled_b @ a

    def _read_weights(self, names):
        return {
            name: take(self.base[whole], part).clone() for name in names for whole, part in [split_part(name)]
        }

    def _read_adapter(self, names):
        return {name: self.held[name] for name in names}


def test_the_adapter_alone_is_sent_and_the_base_once(make_run, tmp_path):
    """Versions, tensors and log-probs are checked after every sync. A mismatch would end the run."""
    engine = BesideEngine()
    module = fit(make_run, STEPS, tmp_path / "run", engine=lambda: engine)
    assert engine.num_base_updates == 1
    assert engine.versions == list(range(STEPS))  # nothing was generated after the last step
    assert flat(module).abs().max() > 0


def test_a_part_of_the_adapter_that_is_not_replaced_is_found(make_run, tmp_path):
    class Forgets(BesideEngine):
        def _update_adapter(self, adapter, version):
            name = "model.layers.0.mlp.up_proj.lora_B.default.weight"
            self.forgets = name if version else None
            super()._update_adapter(adapter, version)

    with pytest.raises(SyncError, match=r"1 of \d+ tensors of the adapter differ"):
        fit(make_run, STEPS, tmp_path / "run", engine=Forgets)


def test_an_engine_for_adapters_needs_one_that_it_can_take(make_run, tmp_path):
    with pytest.raises(ValueError, match=r"max_adapter_rank=4: the policy has no adapter"):
        fit(make_run, 1, tmp_path / "none", adapter=None, engine=BesideEngine)
    with pytest.raises(ValueError, match=r"takes adapters up to rank 4, and the policy's has rank 8"):
        fit(make_run, 1, tmp_path / "large", adapter=Adapter(rank=8), engine=BesideEngine)
    with pytest.raises(ValueError, match=r"max_adapter_rank=0 must be at least 1"):
        VLLMEngine(max_adapter_rank=0)
    with pytest.raises(
        ValueError, match=r"sleep_in_training true .* leave rollout.engine.max_adapter_rank out"
    ):
        VLLMEngine(max_adapter_rank=8, sleep_in_training=True)
