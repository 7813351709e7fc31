from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.types import GenerationRequest, SamplingSettings

LINES = [" the", "</think>\\boxed{ sum}", "0123456789" * 5]
SAMPLING = SamplingSettings(temperature=1.0, max_tokens=24, stop_token_ids=(7,))


@pytest.fixture
def engine(tiny_model_dir: Path):
    with ScriptedEngine(LINES) as engine:
        engine.start(str(tiny_model_dir), seed=0)
        yield engine


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def texts(engine: ScriptedEngine, seed: int = 0) -> list[bytes]:
    request = GenerationRequest(task_id="t", prompt_ids=(40, 41), n=60, seed=seed, sampling=SAMPLING)
    return [completion.text_bytes for completion in engine.generate([request])[0]]


def test_every_line_is_said_in_plain_tokens(engine: ScriptedEngine, model) -> None:
    engine.update_weights(model.named_parameters(remove_duplicate=False), version=0)
    request = GenerationRequest(task_id="t", prompt_ids=(40, 41), n=60, seed=0, sampling=SAMPLING)
    completions = engine.generate([request])[0]
    said = Counter(completion.text_bytes for completion in completions)
    assert set(said) == {
        b" the",
        b"</think>\\boxed{ sum}",
        *[text for text in said if LINES[2].encode().startswith(text)],
    }
    assert min(said.values()) > 8
    for completion in completions:
        if completion.text_bytes in (b" the", b"</think>\\boxed{ sum}"):
            assert (completion.token_ids[-1], completion.finish_reason) == (7, "stop")
        else:
            assert (len(completion.token_ids), completion.finish_reason) == (24, "length")


def test_lines_follow_seed_and_weights(engine: ScriptedEngine, model) -> None:
    weights = {
        name: weight.detach().clone() for name, weight in model.named_parameters(remove_duplicate=False)
    }
    engine.update_weights(weights.items(), version=0)
    first = texts(engine)
    assert texts(engine) == first != texts(engine, seed=1000)
    # The last bit of one weight.
    weights["model.norm.weight"][0] = torch.nextafter(weights["model.norm.weight"][0], torch.tensor(9.0))
    engine.update_weights(weights.items(), version=0)
    assert texts(engine) != first


def test_events_are_kept_in_order(engine: ScriptedEngine, model) -> None:
    engine.update_weights(model.named_parameters(remove_duplicate=False), version=3)
    texts(engine)
    engine.close()
    assert engine.events == ["start", "update 3", "generate 1 requests", "close"]


def test_a_script_must_hold_a_line() -> None:
    with pytest.raises(ValueError, match=r"completions=\[\]"):
        ScriptedEngine([])
