"""`rpt plan` as a user sees it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from rpt_lightning import cli
from rpt_lightning.cli.plan import PlanOptions, optimizer_bytes_per_param, parse, plan_of, plan_text
from rpt_lightning.planning.plan_text import report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QWEN2_14B = str(Path(__file__).resolve().parents[2] / "scripts" / "qwen2-14b.json")
PAPER_RUN = ["--config", str(CONFIGS / "14b.yaml"), "--plan.model_config", QWEN2_14B]
FSDP2 = [
    "--config",
    str(CONFIGS / "strategy" / "fsdp2.yaml"),
    "--trainer.devices",
    "8",
    "--trainer.strategy.gather_bf16",
    "true",
]


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["rpt"])


def text_of(config) -> str:
    plan, assumptions = plan_of(config)
    return report(plan, assumptions=assumptions)


def row(text: str, label: str) -> list[str]:
    """Return the cells after a label."""
    line = next(line for line in text.splitlines() if line.strip().startswith(label))
    return line.strip().removeprefix(label).split()


def number(text: str, label: str) -> float:
    """Return the first cell after a label."""
    return float(row(text, label)[0].replace(",", ""))


@pytest.fixture(scope="module")
def paper_run():
    """Return (text, parsed configuration) of the paper's run on eight H100s. Parsing takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["rpt"])
        config = parse([*PAPER_RUN, *FSDP2])
    return text_of(config), config


def changed(config, **changes):
    """Copy a configuration with other values, by dotted name (``__`` for a dot)."""
    copy = config.clone()
    for name, value in changes.items():
        copy[name.replace("__", ".")] = value
    return copy


def test_the_papers_run_on_eight_h100s(paper_run):
    text = paper_run[0]
    assert "256 contexts (1 from each of 256 documents) x 8 = 2,048 completions" in text
    assert "14,770,033,664 parameters" in text
    assert row(text, "weights, fp32") == ["59.08", "59.08", "7.39"]
    assert row(text, "optimizer  ") == ["-", "-", "-"]
    # A layer's pinned blocks: 3 of 64 MiB, 2 of 16, 2 of 4 (twice, for both moments). Embedding and head: 512
    # MiB each.
    host = 2 * (48 * (3 * 64 + 2 * 16 + 2 * 4) + 2 * 512) * 2**20 / 1e9
    flat = " ".join(text.split())
    assert f"the optimizer's moments are in host memory: {host:.2f} GB per device" in flat
    # Both moments, 8 bytes for each of a rank's weights, go to the device and back at 64 GB/s.
    assert f"{2 * 8 * 14_770_033_664 / 8 / 64e9:.3g} s more to move the moments" in flat
    assert row(text, "autocast's bf16 copy") == ["of", "the", "weights", "0.55", "0.55", "-"]
    assert row(text, "engine: weights") == ["29.54"] * 3
    assert row(text, "does it fit?") == ["NO", "NO", "yes"]
    assert float(row(text, "total")[2]) < 0.9 * 84.9  # a margin of a tenth for what the plan does not know
    assert max(map(len, text.splitlines())) <= 100


def test_cpu_offload(paper_run):
    given = {
        "model__init_args__offload_moments": False,
        "trainer__strategy__init_args__cpu_offload": True,
        "rollout__engine__init_args__gpu_memory_utilization": 0.6,
    }
    text = text_of(changed(paper_run[1], **given))
    assert row(text, "weights, fp32") == ["59.08", "59.08", "-"]
    # 8 bytes of 14.77e9 / 8 for the moments, and the pinned blocks of weights and gradients.
    host = (8 * 14_770_033_664 / 8 + 2 * (48 * (3 * 64 + 2 * 16 + 2 * 4) + 2 * 512) * 2**20) / 1e9
    assert f"weights, gradients and optimizer are in host memory: {host:.2f} GB per device" in text


def test_what_fits_on_eight_devices(paper_run):
    """Each arrangement has the largest share of vLLM's that leaves a tenth of the device free."""
    plan, _ = plan_of(paper_run[1])
    found = {(other.offload, other.sleeps): other for other in plan.alternatives}
    assert ("nothing offloaded", False) not in found
    assert len(found) == 5
    for (offload, sleeps), other in found.items():
        given = {
            "model__init_args__offload_moments": offload == "moments offloaded",
            "trainer__strategy__init_args__cpu_offload": offload == "CPU offload",
            "rollout__engine__init_args__sleep_in_training": sleeps,
        }
        for more, fits in ((0, True), (0.05, False)):
            share = {"rollout__engine__init_args__gpu_memory_utilization": other.share + more}
            fit = plan_of(changed(paper_run[1], **given, **share))[0].fit
            assert (fit.total_bytes <= 0.9 * fit.device_bytes) is fits, (offload, sleeps)
            if fits:
                assert fit.total_bytes == pytest.approx(other.total_bytes)
    assert "moments offloaded, engine asleep" in paper_run[0]


def test_without_offload_eight_devices_have_no_margin(paper_run):
    text = text_of(changed(paper_run[1], model__init_args__offload_moments=False))
    assert row(text, "weights, fp32") == ["59.08", "59.08", "7.39"]
    assert row(text, "optimizer  ") == ["118.16", "118.16", "14.77"]
    assert row(text, "does it fit?") == ["NO", "NO", "NO"]
    smallest = {
        "model__init_args__offload_moments": False,
        "rollout__engine__init_args__gpu_memory_utilization": 0.41,
    }
    text = text_of(changed(paper_run[1], **smallest))
    assert float(row(text, "total")[2]) == pytest.approx(84.48, abs=0.01)
    # By hand: a cached token has 2 x 48 x 1024 x 2 bytes, and a sequence has 2176 / 8 + 512 tokens of its
    # own, so 3.14 GB hold 20.3 sequences. A pass reads 27.98 GB of weights and 20.3 x 2688 tokens at
    # 0.7 x 3.35 TB/s. There are 256 x 1024 / 20.3 passes.
    token, share = 2 * 48 * 1024 * 2, 0.7 * 3.35e12
    sequences = (0.41 * 79.1 * 2**30 - 29.540e9 - 2 * 2**30) / (784 * token)
    seconds = 256 * 1024 / sequences * (2 * 13_991_465_984 + sequences * 2688 * token) / share
    assert number(text, "generation: decoding") == pytest.approx(seconds, rel=0.005)
    assert "The first bottleneck is memory" in text_of(
        changed(paper_run[1], **(smallest | {"rollout__engine__init_args__gpu_memory_utilization": 0.40}))
    )


def test_rollouts_on_servers(paper_run):
    transport = Namespace(class_path="SharedFolderTransport", init_args=Namespace(folder="shared"))
    servers = Namespace(
        class_path="VLLMServerEngine",
        init_args=Namespace(urls=["http://a:1", "http://b:1"], dtype="bfloat16", transport=transport),
    )
    text = text_of(
        changed(
            paper_run[1],
            rollout__engine=servers,
            plan__num_devices=6,
            model__init_args__offload_moments=False,
        )
    )
    assert "6 x H100 SXM train, 2 generate" in text
    assert row(text, "weights, fp32")[2] == "9.85"
    assert "engine: weights" not in text
    assert row(text, "does it fit?")[2] == "yes"
    flat = " ".join(text.split())
    # 0.9 of 84.9 GB, minus 29.54 of weights and 2.15 of workspace
    assert "a server holds 29.54 GB of weights and 44.75 GB of cached keys and values" in flat
    assert "a server receives 29.5 GB" in flat
    assert (
        "through a folder, written once and read once by every node of 8 servers, at 10 GB/s in all" in flat
    )
    transport.class_path = "rpt_lightning.rollout.weight_sync.nccl_transport.NCCLTransport"
    nccl = text_of(
        changed(
            paper_run[1],
            rollout__engine=servers,
            plan__num_devices=6,
            model__init_args__offload_moments=False,
        )
    )
    assert "one broadcast at 50 GB/s (NCCLTransport)" in " ".join(nccl.split())
    # Written and read at 10 GB/s instead of sent at 50. On both hosts the weights cross a link of 64 GB/s
    # and their digests are computed at 10.
    assert number(text, "weight sync") - number(nccl, "weight sync") == pytest.approx(
        29.54 * (2 / 10 - 1 / 50 + 2 * (1 / 64 + 1 / 10)), rel=0.01
    )
    # Only what changed: 4.5 % of the bytes, and a tenth of a full set written for servers that come late.
    transport.class_path, transport.init_args.full_every = "SharedFolderTransport", 10
    delta = text_of(
        changed(
            paper_run[1],
            rollout__engine=servers,
            plan__num_devices=6,
            model__init_args__offload_moments=False,
        )
    )
    assert "a server receives 1.3 GB" in " ".join(delta.split())
    assert "what changed (3.0% of the weights, --plan.changed_frac), written once" in " ".join(delta.split())
    assert number(delta, "weight sync") - number(nccl, "weight sync") == pytest.approx(
        29.54 * ((2 * 0.045 + 0.1) / 10 - 1 / 50 + 2 * (1 / 64 + 1 / 10)), rel=0.01
    )
    many = text_of(
        changed(paper_run[1], rollout__engine=servers, plan__num_devices=64, plan__num_servers=300)
    )
    assert "44 of 300 servers have nothing to generate" in " ".join(many.split())
    with pytest.raises(ValueError, match=r"--plan.num_servers: only rollout.engine VLLMServerEngine"):
        plan_of(changed(paper_run[1], plan__num_servers=2))


def test_an_engine_that_sleeps_shares_its_memory_with_training(paper_run):
    given = {
        "model__init_args__offload_moments": False,
        "rollout__engine__init_args__gpu_memory_utilization": 0.55,
    }
    awake = text_of(changed(paper_run[1], **given))
    asleep = text_of(changed(paper_run[1], **given, rollout__engine__init_args__sleep_in_training=True))
    assert row(awake, "does it fit?")[2] == "NO"
    assert row(asleep, "does it fit?")[2] == "yes"
    # During generation: an eighth of 12 bytes for each of 14.77e9 parameters (gradients are freed), 0.55 of
    # 79.1 GiB, and 1.5 and 2 GiB for CUDA graphs and contexts.
    assert float(row(asleep, "peak, taking turns")[2]) == pytest.approx(
        14.770e9 * 12 / 8 / 1e9 + (0.55 * 79.1 + 3.5) * 2**30 / 1e9, abs=0.01
    )


def test_an_engine_that_does_not_start_has_no_times(paper_run):
    text = text_of(changed(paper_run[1], rollout__engine__init_args__gpu_memory_utilization=0.3))
    assert row(text, "does it fit?") == ["NO", "NO", "NO"]
    assert "No times, because the engine does not start" in text
    assert "generation: decoding" not in text
    assert "The first bottleneck is memory: the engine does not start" in " ".join(text.split())


def test_more_and_larger_devices(paper_run):
    larger = changed(
        paper_run[1],
        plan__device="h200",
        plan__num_devices=64,
        rollout__engine__init_args__gpu_memory_utilization=0.5,
    )
    larger = changed(larger, model__init_args__offload_moments=False)
    text = text_of(larger)
    assert "(H200 SXM: 150)" in text
    assert row(text, "weights, fp32") == ["59.08", "59.08", "0.92"]
    assert row(text, "does it fit?") == ["NO", "NO", "yes"]
    assert "on 64 ranks (4 contexts each)" in " ".join(text.split())
    assert re.search(r"The first bottleneck is (generation|training): \d+% of the step", text)
    many = text_of(changed(larger, plan__num_devices=1024))
    assert "768 of 1,024 ranks have nothing to train" in " ".join(many.split())


def test_a_strategy_that_gathers_fp32_is_believed(paper_run):
    strategy = Namespace(
        class_path="ShardedStrategy", init_args=Namespace(tensor_parallel_size=1, gather_bf16=False)
    )
    text = text_of(changed(paper_run[1], trainer__strategy=strategy))
    assert row(text, "autocast's bf16 copy") == ["of", "the", "weights", *["0.55"] * 3]
    assert "autocast casts them" in " ".join(text.split())


def test_settings_reach_the_plan(paper_run):
    text = text_of(
        changed(
            paper_run[1],
            rollout__group_size=4,
            model__init_args__policy__init_args__activation_checkpointing=False,
        )
    )
    assert "x 4 = 1,024 completions" in text
    assert number(text, "activations, all layers kept") > number(
        paper_run[0], "activations, layers recomputed"
    )


def test_optimizer_state_is_that_of_the_real_class():
    def state(class_path, **options):
        return optimizer_bytes_per_param(
            Namespace(class_path=class_path, init_args=Namespace(lr=0.1, **options))
        )

    assert state("torch.optim.AdamW") == 8
    assert state("torch.optim.AdamW", amsgrad=True) == 12
    assert state("torch.optim.SGD") == 0
    assert state("torch.optim.SGD", momentum=0.9) == 4


def test_prompts_of_the_task_folder(tiny_model_dir, tiny_task_dir):
    """Tokens are counted on the batch that a run would begin with."""
    from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
    from rpt_lightning.objectives.prompts.template import ContinuationPrompt

    flags = [
        "--model.policy.path",
        str(tiny_model_dir),
        "--data.task_dir",
        str(tiny_task_dir),
        "--data.tasks_per_step",
        "8",
    ]
    text = plan_text(["--config", str(CONFIGS / "debug.yaml"), *flags])
    data = TokenTaskDataModule(str(tiny_task_dir), tasks_per_step=8, positions_per_document=4)
    data.setup("fit")
    prompt = ContinuationPrompt().bind(data.train.tokenizer)
    lengths = [len(prompt.prompt_ids(task.context_ids)) for task in next(iter(data.train_dataloader())).tasks]
    assert f"those of the run's first step, from {tiny_task_dir}" in " ".join(text.split())
    assert number(text, "trained, each completion alone") == sum(
        4 * (length + 8) for length in lengths
    )  # half of 16 tokens each
    assert number(text, "trained, prefixes shared") < number(
        text, "trained, each completion alone"
    ) - 3 * sum(lengths)
    assert "this CPU, measured" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"device": "b9000"}, "--plan.device b9000: choose from h100"),
        ({"completion_tokens": 0}, "--plan.completion_tokens 0"),
        ({"mfu": 40}, "--plan.mfu 40"),
    ],
)
def test_bad_options(options, expected):
    with pytest.raises(ValueError, match=expected):
        PlanOptions(**options)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"plan__context_tokens": 9000}, "contexts are cut to 3840"),
        ({"plan__model_config": "no/such/config.json"}, "no/such/config.json"),
        ({"trainer__strategy": "deepspeed"}, "deepspeed"),
        ({"trainer__strategy__init_args__tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"rollout__engine": None}, "rollout.engine is not set"),
        ({"model__class_path": "rpt_lightning.training.modules.ntp_module.NTPModule"}, "RPTModule"),
    ],
)
def test_runs_that_cannot_be_planned(paper_run, changes, expected):
    with pytest.raises(ValueError, match=expected):
        plan_of(changed(paper_run[1], **changes))


def test_a_hub_id_without_network_names_the_way_out(monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main(["plan", "--config", str(CONFIGS / "14b.yaml")]) == 1
    shown = capfd.readouterr().err
    assert "DeepSeek-R1-Distill-Qwen-14B" in shown
    assert "--plan.model_config" in shown
    assert len(shown.strip().splitlines()) == 1


def test_nothing_is_built(monkeypatch, tiny_model_dir, tmp_path, capfd):
    """The plan needs no weights, no trainer and no run folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(
        tiny_model_dir / "config.json", tmp_path / "config.json"
    )  # no weights and no tokenizer beside it
    monkeypatch.setattr(torch.nn.Module, "to", lambda *args: pytest.fail("a module was moved"))
    assert (
        cli.main(["plan", "--config", str(CONFIGS / "debug.yaml"), "--plan.model_config", str(tmp_path)]) == 0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "there is no task folder tasks/debug" in " ".join(capfd.readouterr().out.split())
