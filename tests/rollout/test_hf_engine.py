from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.rollout.engines.hf_engine import HFEngine, SeededDraw, _batches
from rpt_lightning.types import GenerationRequest, SamplingSettings

PROBS = torch.tensor([0.5, 0.3, 0.15, 0.05])


def draws(sampling: SamplingSettings, num: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shares of the four tokens among ``num`` rows, and the log-prob recorded for each."""
    draw = SeededDraw(sampling, range(num), torch.device("cpu"))
    scores = draw(torch.zeros(num, 1, dtype=torch.long), PROBS.log().expand(num, 4))
    chosen = scores.argmax(-1)
    recorded = torch.stack([draw.logprobs[0][chosen == token].mean() for token in range(4)])
    return torch.bincount(chosen, minlength=4) / num, recorded.exp()


def settings(**changes: float) -> SamplingSettings:
    return SamplingSettings(**{"temperature": 1.0, "max_tokens": 1, "stop_token_ids": (), **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        # p^2 normalised: 0.25, 0.09, 0.0225 and 0.0025 divided by their sum 0.365
        ({"temperature": 0.5}, [0.684932, 0.246575, 0.061644, 0.006849]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.8}, [0.625, 0.375, 0, 0]),
        ({"min_p": 0.25}, [0.526316, 0.315789, 0.157895, 0]),
        ({"temperature": 0.0}, [1.0, 0, 0, 0]),
    ],
)
def test_draws_follow_the_processed_distribution(changes: dict, expected: list[float]) -> None:
    shares, recorded = draws(settings(**changes))
    # Four standard errors of a share among 4,000 draws.
    torch.testing.assert_close(shares, torch.tensor(expected), atol=0.032, rtol=0)
    # The recorded probability is that of the distribution drawn from. Greedy decoding uses temperature 1.
    wanted = torch.tensor(expected) if changes.get("temperature", 1.0) > 0 else PROBS
    torch.testing.assert_close(recorded[shares > 0], wanted[shares > 0], atol=1e-5, rtol=0)


def test_noise_belongs_to_the_seed_and_not_to_the_row() -> None:
    def chosen(seeds: list[int]) -> list[int]:
        draw = SeededDraw(settings(), seeds, torch.device("cpu"))
        return [
            draw(torch.zeros(len(seeds), 1, dtype=torch.long), torch.zeros(len(seeds), 1000))
            .argmax(-1)
            .tolist()
            for _ in range(3)
        ]

    rows = torch.tensor(chosen([1, 2, 3]))  # [steps, N]
    assert torch.equal(torch.tensor(chosen([3, 1]))[:, 0], rows[:, 2])
    assert torch.equal(torch.tensor(chosen([3, 1]))[:, 1], rows[:, 0])
    assert rows.unique().numel() == 9


def test_batches_keep_to_the_token_budget_and_lose_no_row() -> None:
    def request(length: int, n: int, temperature: float = 0.8) -> GenerationRequest:
        sampling = SamplingSettings(temperature=temperature, max_tokens=10, stop_token_ids=())
        return GenerationRequest(task_id="t", prompt_ids=(1,) * length, n=n, seed=0, sampling=sampling)

    requests = [request(30, 2), request(5, 3), request(200, 1), request(5, 1, temperature=0.0)]
    batches = list(_batches(requests, 100))
    # Rows of 15 tokens, then rows of 40 with at most two in a batch, then one beyond the budget on its own.
    # Other settings get their own batch.
    assert batches == [[(1, 0), (1, 1), (1, 2)], [(0, 0), (0, 1)], [(2, 0)], [(3, 0)]]


def test_a_stop_token_ends_the_completion_and_is_part_of_it(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    sampling = SamplingSettings(temperature=2.0, max_tokens=40, stop_token_ids=tuple(range(0, 512, 16)))
    requests = [GenerationRequest(task_id="t", prompt_ids=(40, 41), n=64, seed=0, sampling=sampling)]
    with HFEngine(dtype="float32", device="cpu") as engine:
        engine.start(str(tiny_model_dir), seed=0)
        engine.update_weights(model.named_parameters(remove_duplicate=False), version=0)
        completions = engine.generate(requests)[0]
    finished = [completion for completion in completions if completion.finish_reason == "stop"]
    assert len(finished) > 20  # within 40 tokens, of which 1 in 16 stops
    for completion in completions:
        stops = [token_id % 16 == 0 for token_id in completion.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (completion.finish_reason == "stop")
        assert completion.is_truncated == (not stops[-1])
        assert len(completion.rollout_logprobs) == len(completion.token_ids) <= 40
        assert stops[-1] or len(completion.token_ids) == 40


def test_the_models_own_generation_defaults_do_not_reach_the_engine(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.generation_config.update(
        do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.1, suppress_tokens=[40]
    )
    model.save_pretrained(tmp_path)
    for file in tiny_model_dir.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    request = GenerationRequest(
        task_id="t",
        prompt_ids=(40, 41),
        n=8,
        seed=0,
        sampling=SamplingSettings(temperature=1.0, max_tokens=8, stop_token_ids=()),
    )
    results = []
    for folder in (tiny_model_dir, tmp_path):
        with HFEngine(dtype="float32", device="cpu") as engine:
            engine.start(str(folder), seed=0)
            engine.update_weights(model.named_parameters(remove_duplicate=False), version=0)
            results.append(engine.generate([request])[0])
    assert results[0] == results[1]
