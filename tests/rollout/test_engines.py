"""The contract of engines, tested on those without vLLM. tests/integration tests vLLM against it too."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rpt_lightning.objectives.box import extract_prediction
from rpt_lightning.rollout.engines.base import GenerationInterrupted, RolloutEngine
from rpt_lightning.rollout.engines.hf_engine import HFEngine
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.types import Completion, GenerationRequest, SamplingSettings

SAMPLING = SamplingSettings(temperature=0.8, max_tokens=12, stop_token_ids=(7, 11))
REQUEST = GenerationRequest(task_id="doc-7:4", prompt_ids=(40, 41, 42), n=3, seed=5, sampling=SAMPLING)
LINES = ["a", "b</think>\\boxed{ c}", "longer than twelve tokens of plain text, surely: 0123456789"]
ENGINES = {"hf": lambda: HFEngine(dtype="float32", device="cpu"), "scripted": lambda: ScriptedEngine(LINES)}


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # away from the uniform distribution
    return model


def named_weights(model):
    yield from model.named_parameters(remove_duplicate=False)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny_model_dir: Path):
    with ENGINES[request.param]() as engine:
        engine.start(str(tiny_model_dir), seed=0, max_model_len=64)
        yield engine


def test_generation_needs_weights(engine: RolloutEngine, policy) -> None:
    assert engine.version is None
    with pytest.raises(RuntimeError, match="update_weights first"):
        engine.generate([REQUEST])
    engine.update_weights(named_weights(policy), version=4)
    assert engine.version == 4
    assert {completion.policy_version for completion in engine.generate([REQUEST])[0]} == {4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {name: weight for name, weight in weights.items() if name != "lm_head.weight"},
            "lacks lm_head.weight .a tied head",
        ),
        (
            lambda weights: {
                name: weight for name, weight in weights.items() if "layers.1.self_attn.q" not in name
            },
            r"layers.1.self_attn.q_proj.weight",
        ),
        (lambda weights: weights | {"model.layers.9.x": torch.zeros(1)}, "contains model.layers.9.x, which"),
        (
            lambda weights: weights | {"model.norm.weight": torch.zeros(1)},
            r"contains model.norm.weight with shape \(1,\).*\(128,\)",
        ),
    ],
)
def test_a_wrong_update_is_refused_and_leaves_no_version(
    engine: RolloutEngine, policy, change, message: str
) -> None:
    weights = dict(named_weights(policy))
    engine.update_weights(weights.items(), version=1)
    with pytest.raises(ValueError, match=message):
        engine.update_weights(change(weights).items(), version=2)
    assert engine.version is None
    with pytest.raises(RuntimeError, match="the last one failed"):
        engine.generate([REQUEST])


def test_weights_read_back_are_those_delivered(engine: RolloutEngine, policy) -> None:
    engine.update_weights(named_weights(policy), version=0)
    weights = dict(named_weights(policy))
    assert engine.weight_names == tuple(weights)
    held = engine.read_weights(engine.weight_names)
    assert all(torch.equal(held[name], weights[name]) for name in weights)
    held["model.norm.weight"].zero_()  # a copy
    assert engine.read_weights(["model.norm.weight"])["model.norm.weight"].abs().sum() > 0
    with pytest.raises(ValueError, match="no weight nonsense"):
        engine.read_weights(["nonsense"])


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.7])
def test_logprobs_are_those_of_the_tempered_distribution(
    engine: RolloutEngine, policy, temperature: float
) -> None:
    engine.update_weights(named_weights(policy), version=0)
    sampling = replace(SAMPLING, temperature=temperature)
    requests = [
        replace(REQUEST, sampling=sampling),
        replace(REQUEST, prompt_ids=tuple(range(50, 80)), sampling=sampling, seed=9),
    ]
    for request, completions in zip(requests, engine.generate(requests), strict=True):
        for completion in completions:
            expected = reference_logprobs(
                policy, request.prompt_ids, completion.token_ids, temperature or 1.0
            )
            torch.testing.assert_close(torch.tensor(completion.rollout_logprobs), expected, atol=2e-5, rtol=0)


@torch.no_grad()
def reference_logprobs(model, prompt_ids, token_ids, temperature: float) -> torch.Tensor:
    logits = model(torch.tensor([prompt_ids + token_ids])).logits[0, len(prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1)[torch.arange(len(token_ids)), list(token_ids)]


def test_completions_do_not_depend_on_the_batch(engine: RolloutEngine, policy) -> None:
    engine.update_weights(named_weights(policy), version=0)
    requests = [
        replace(REQUEST, task_id=str(length), prompt_ids=tuple(range(40, 40 + length)), seed=100 * length)
        for length in (9, 2, 30, 3)
    ]
    together = engine.generate(requests)
    for request, completions in zip(requests, together, strict=True):
        for index, completion in enumerate(completions):
            (alone,) = engine.generate([replace(request, n=1, seed=request.seed + index)])[0]
            assert (alone.token_ids, alone.text_bytes) == (completion.token_ids, completion.text_bytes)
            assert alone.rollout_logprobs == pytest.approx(completion.rollout_logprobs, abs=2e-5)
    assert len({completion.token_ids for row in together for completion in row}) > 1


def boxes_everywhere(token_id: int) -> bytes:
    """Map ids to a vocabulary with frequent boxes, so a random model closes one within a few tokens."""
    return (b"\\boxed{", b"}", b"x", b"|")[token_id % 4]


@pytest.mark.parametrize("think_close", [None, b"|"])
def test_a_completion_may_end_with_its_first_box(
    engine: RolloutEngine, policy, think_close, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.update_weights(named_weights(policy), version=0)
    monkeypatch.setattr(engine, "_bytes_of", boxes_everywhere)
    whole = [
        replace(REQUEST, prompt_ids=tuple(range(40, 40 + length)), n=8, seed=100 * length)
        for length in (9, 2, 30)
    ]
    stopping = replace(SAMPLING, stop_after_first_box=True, think_close=think_close)
    rows = zip(
        engine.generate(whole),
        engine.generate([replace(request, sampling=stopping) for request in whole]),
        strict=True,
    )
    pairs = [pair for row in rows for pair in zip(*row, strict=True)]
    num_cut = sum(check_first_box(full, cut, think_close) for full, cut in pairs)
    assert 3 < num_cut < len(pairs)


def test_a_completion_may_end_after_its_thought(
    engine: RolloutEngine, policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.update_weights(named_weights(policy), version=0)
    monkeypatch.setattr(engine, "_bytes_of", boxes_everywhere)
    request = replace(REQUEST, n=24)
    ending = replace(SAMPLING, think_close=b"|", tokens_after_thought=1)
    (whole,) = engine.generate([request])
    (cut,) = engine.generate([replace(request, sampling=ending)])
    num_cut = 0
    for full, short in zip(whole, cut, strict=True):
        stopped = full.token_ids[-1] in SAMPLING.stop_token_ids
        place = full.text_bytes.find(b"|")
        before = [boxes_everywhere(token_id) for token_id in full.token_ids[: -1 if stopped else None]]
        closed = next((number for number, token in enumerate(before) if token == b"|"), None)
        if closed is None or closed + 2 > len(before):
            assert short == full
            continue
        num_cut += 1
        assert place >= 0
        assert short.token_ids == full.token_ids[: closed + 2]
        assert short.text_bytes == b"".join(before[: closed + 2])
        assert short.rollout_logprobs == pytest.approx(full.rollout_logprobs[: closed + 2], abs=2e-5)
        assert short.finish_reason == "stop"
    assert num_cut > 3


def check_first_box(full: Completion, cut: Completion, think_close: bytes | None) -> bool:
    """Compare a completion with the same one without the rule. Return whether the rule ended it."""
    tokens = [
        boxes_everywhere(token_id) for token_id in full.token_ids if token_id not in SAMPLING.stop_token_ids
    ]
    ends = [
        end
        for end in range(1, len(tokens) + 1)
        if extract_prediction(b"".join(tokens[:end]), think_close=think_close) is not None
    ]
    if not ends:
        assert cut == full
        return False
    assert cut.token_ids == full.token_ids[: ends[0]]
    assert cut.rollout_logprobs == pytest.approx(full.rollout_logprobs[: ends[0]], abs=2e-5)
    assert cut.text_bytes == b"".join(tokens[: ends[0]])
    assert (cut.finish_reason, cut.policy_version) == ("stop", full.policy_version)
    return True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt_ids": tuple(range(60))},
            r"doc-7:4.*prompt of 60 tokens and max_tokens=12 exceed max_model_len=64",
        ),
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"n": 0}, "n=0"),
        ({"seed": 2**63 - 2}, "seed=9223372036854775806"),
        ({"sampling": replace(SAMPLING, max_tokens=0)}, "max_tokens=0"),
        ({"sampling": replace(SAMPLING, temperature=-0.1)}, "temperature=-0.1"),
        ({"sampling": replace(SAMPLING, temperature=2.5)}, "temperature=2.5"),
        ({"sampling": replace(SAMPLING, top_p=0.0)}, "top_p=0.0"),
        ({"sampling": replace(SAMPLING, top_k=-1)}, "top_k=-1"),
        ({"sampling": replace(SAMPLING, min_p=1.5)}, "min_p=1.5"),
    ],
)
def test_bad_requests_are_refused_by_name(engine: RolloutEngine, policy, change, message: str) -> None:
    engine.update_weights(named_weights(policy), version=0)
    with pytest.raises(ValueError, match=message):
        engine.generate([REQUEST, replace(REQUEST, **change)])


def test_the_life_of_an_engine(engine: RolloutEngine, policy, tiny_model_dir: Path) -> None:
    with pytest.raises(RuntimeError, match="already started"):
        engine.start(str(tiny_model_dir), seed=0)
    engine.close()
    engine.close()
    assert engine.weight_names == ()  # tells the callback that it must start the engine
    for call in (
        lambda: engine.update_weights(named_weights(policy), version=0),
        lambda: engine.read_weights([]),
    ):
        with pytest.raises(RuntimeError, match="before start"):
            call()
    engine.start(str(tiny_model_dir), seed=0)
    assert (engine.version, engine.max_model_len) == (None, 1024)


def test_weights_do_not_change_under_a_generation_which_can_be_interrupted(
    engine: RolloutEngine, policy, tiny_model_dir: Path, monkeypatch
) -> None:
    engine.update_weights(named_weights(policy), version=1)
    began, go, ask = threading.Event(), threading.Event(), engine._check_interrupted

    def ask_slowly() -> None:
        began.set()
        assert go.wait(60)
        ask()

    monkeypatch.setattr(engine, "_check_interrupted", ask_slowly)
    with ThreadPoolExecutor() as pool:
        try:
            rows = pool.submit(engine.generate, [REQUEST])
            assert began.wait(60)
            with pytest.raises(RuntimeError, match="update_weights while generate runs in another thread"):
                engine.update_weights(named_weights(policy), version=2)
            assert engine.version == 1
            engine.interrupt()
        finally:
            go.set()
        with pytest.raises(GenerationInterrupted):
            rows.result()
    with pytest.raises(GenerationInterrupted):
        engine.generate([REQUEST])
    engine.close()
    engine.start(str(tiny_model_dir), seed=0, max_model_len=64)
    engine.update_weights(named_weights(policy), version=2)
    assert len(engine.generate([REQUEST])[0]) == 3


def test_a_length_beyond_the_model_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ValueError, match="max_model_len=2000 must lie between 1 and the 1024 positions"):
        ScriptedEngine(LINES).start(str(tiny_model_dir), seed=0, max_model_len=2000)


def test_the_trainers_generator_is_not_touched(policy, tiny_model_dir: Path) -> None:
    for make in ENGINES.values():
        state = torch.get_rng_state()
        with make() as engine:
            engine.start(str(tiny_model_dir), seed=0)
            engine.update_weights(named_weights(policy), version=0)
            engine.generate([REQUEST])
        assert torch.equal(state, torch.get_rng_state())
