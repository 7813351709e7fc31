"""The real vLLM engine against transformers, on tiny random models of the architectures in RPT's recipes."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MinPLogitsWarper,
    Qwen2Config,
    Qwen3Config,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rpt_lightning.objectives.box import extract_prediction
from rpt_lightning.rollout.engines.vllm.vllm_engine import VLLMEngine
from rpt_lightning.rollout.weight_sync.weight_part import part_name
from rpt_lightning.training.engine_check.logprob_diff import LOGPROB_LIMITS, compare_logprobs
from rpt_lightning.training.engine_check.sync_check import SyncError, check_logprobs, check_weights
from rpt_lightning.types import Completion, GenerationRequest, SamplingSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        sys.platform != "linux" or importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed here",
    ),
]

SAMPLING = SamplingSettings(temperature=0.8, max_tokens=16, stop_token_ids=tuple(range(0, 512, 32)))
SHAPES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
# A vocabulary that vLLM pads to a multiple of 64.
QWEN = SHAPES | {"vocab_size": 515, "max_position_embeddings": 1024}


def make_config(kind: str, tiny_model_dir: Path):
    if kind == "qwen2":
        return Qwen2Config(**QWEN, tie_word_embeddings=True)
    if kind == "qwen3":
        return Qwen3Config(**QWEN, tie_word_embeddings=False)
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.tie_word_embeddings = kind == "llama-tied"
    return config


def make_policy(config, seed: int):
    """Return a policy with random weights, including biases and norms.

    They are far enough from uniform that a wrong tensor shows.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3.0 if "embed" in name or "lm_head" in name else 4.0)
    model.config.architectures = [type(model).__name__]
    return model.eval()


FURTHER = [pytest.param(kind, marks=pytest.mark.long) for kind in ("llama-untied bfloat16", "qwen2 float32")]
KINDS = ["llama-tied float32", "qwen3 bfloat16", *FURTHER]


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory):
    """A running engine and a policy of the same architecture.

    There are four starts in one process, so closing must leave room for the next.
    """
    kind, dtype = request.param.split()
    folder = tmp_path_factory.mktemp(kind)
    for file in tiny_model_dir.glob("tokenizer*"):
        shutil.copy(file, folder)
    config = make_config(kind, tiny_model_dir)
    policy = make_policy(config, seed=0)
    policy.config.save_pretrained(folder)  # an engine needs only configuration and tokenizer
    with VLLMEngine(dtype=dtype, kv_cache_gib=0.25) as engine:
        engine.start(str(folder), seed=0, max_model_len=512)
        yield engine, policy
    assert not torch.distributed.is_initialized()


@pytest.fixture
def engine(world) -> VLLMEngine:
    engine, policy = world
    engine.update_weights(weights(policy), version=0)
    return engine


@pytest.fixture
def policy(world):
    return world[1]


def weights(policy):
    return policy.named_parameters(remove_duplicate=False)


def make_requests(num: int = 4, n: int = 2, sampling: SamplingSettings = SAMPLING) -> list[GenerationRequest]:
    numbers = torch.Generator().manual_seed(1)
    lengths = [5, 140, 9, 300][:num]
    prompts = [tuple(torch.randint(1, 500, (length,), generator=numbers).tolist()) for length in lengths]
    return [
        GenerationRequest(task_id=f"d:{i}", prompt_ids=prompt, n=n, seed=100 * i, sampling=sampling)
        for i, prompt in enumerate(prompts)
    ]


@torch.no_grad()
def reference_logprobs(
    policy, engine: VLLMEngine, request: GenerationRequest, completion: Completion
) -> torch.Tensor:
    """Return transformers' log-probs in fp32, with the weights rounded to the engine's dtype."""
    model = rounded(policy, engine.dtype)
    logits = (
        model(torch.tensor([request.prompt_ids + completion.token_ids]))
        .logits[0, len(request.prompt_ids) - 1 : -1]
        .float()
    )
    if request.sampling.temperature > 0:
        sampling = request.sampling
        logits = logits / sampling.temperature
        if sampling.min_p > 0:
            logits = MinPLogitsWarper(sampling.min_p)(None, logits)
        if sampling.top_k > 0:
            logits = TopKLogitsWarper(sampling.top_k)(None, logits)
        if sampling.top_p < 1:
            logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    return logits.log_softmax(-1)[torch.arange(len(completion.token_ids)), list(completion.token_ids)]


_ROUNDED: dict = {}


def rounded(policy, dtype: torch.dtype):
    if dtype == torch.float32:
        return policy
    if id(policy) not in _ROUNDED:
        model = AutoModelForCausalLM.from_config(policy.config, dtype=dtype).eval()
        model.load_state_dict(policy.state_dict())
        _ROUNDED[id(policy)] = model
    return _ROUNDED[id(policy)]


def both_logprobs(
    policy, engine: VLLMEngine, requests: list[GenerationRequest]
) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [
        (request, completion)
        for request, row in zip(requests, engine.generate(requests), strict=True)
        for completion in row
    ]
    rollout = torch.tensor([value for _, completion in pairs for value in completion.rollout_logprobs])
    expected = torch.cat(
        [reference_logprobs(policy, engine, request, completion) for request, completion in pairs]
    )
    return rollout, expected


def difference(policy, engine: VLLMEngine, requests: list[GenerationRequest]):
    rollout, expected = both_logprobs(policy, engine, requests)
    return compare_logprobs(rollout[None], expected[None], torch.ones(1, len(rollout)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.0}, {"temperature": 1.5}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()) or "pure",
)
def test_logprobs_agree_with_transformers(engine: VLLMEngine, policy, changes: dict) -> None:
    rollout, expected = both_logprobs(policy, engine, make_requests(sampling=replace(SAMPLING, **changes)))
    diff = compare_logprobs(rollout[None], expected[None], torch.ones(1, len(rollout)))
    print(engine.dtype, diff, (rollout - expected).abs().median())
    if engine.dtype == torch.float32:
        assert diff.max < 1e-3
    elif changes.keys() <= {"temperature"}:
        check_logprobs(diff, LOGPROB_LIMITS[engine.dtype], version=0)
    else:  # most agree, but rounding moves a few tokens beyond the edge of a truncation, without a log-prob
        assert (rollout - expected).abs().median() < LOGPROB_LIMITS[engine.dtype].mean
        assert expected.isneginf().float().mean() < 0.1


def test_every_weight_can_be_read_back(engine: VLLMEngine, policy) -> None:
    names = tuple(dict(weights(policy)))
    assert set(engine.weight_names) == set(names)
    held = engine.read_weights(names)
    for name, weight in weights(policy):
        assert held[name].dtype == engine.dtype
        assert torch.equal(held[name], weight.detach().to(engine.dtype)), name
    matrices = [name for name in names if held[name].ndim == 2]
    parts = engine.read_weights([part_name(name, slice(3, 11)) for name in matrices])
    assert all(
        torch.equal(part, held[name][:, 3:11]) for name, part in zip(matrices, parts.values(), strict=True)
    )
    check_weights(engine, weights(policy), version=0, num_tensors=1000)


def test_a_missing_tied_head_or_projection_is_caught(engine: VLLMEngine, policy) -> None:
    for missing in ("lm_head.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        with pytest.raises(ValueError, match=f"update to version 1 lacks {missing}"):
            engine.update_weights(
                [(name, weight) for name, weight in weights(policy) if name != missing], version=1
            )
        assert engine.version is None
        with pytest.raises(RuntimeError, match="the last one failed"):
            engine.generate(make_requests())
    engine.update_weights(weights(policy), version=2)  # and it recovers
    check_weights(engine, weights(policy), version=2, num_tensors=1000)


def test_a_head_that_stayed_behind_is_seen_by_tensors_and_logprobs(engine: VLLMEngine, policy) -> None:
    other = make_policy(policy.config, seed=1)
    # Bypass the engine's own check, as if vLLM had dropped the tensor. The packed head then belongs to the
    # old weights.
    without_head = [(name, weight) for name, weight in weights(other) if name != "lm_head.weight"]
    engine._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": without_head})
    with pytest.raises(SyncError, match=r"1 of \d+ compared tensors differ .*: lm_head.weight"):
        check_weights(engine, weights(other), version=0, num_tensors=1000)
    diff = difference(other, engine, make_requests())
    with pytest.raises(SyncError, match="version 0: log-probs of engine and policy differ"):
        check_logprobs(diff, LOGPROB_LIMITS[engine.dtype], version=0)


def test_one_stale_tensor_is_caught(engine: VLLMEngine, policy) -> None:
    other = make_policy(policy.config, seed=1)
    old = dict(weights(policy))
    for stale in (
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ):
        engine.update_weights(
            [(name, old[name] if name == stale else weight) for name, weight in weights(other)], version=1
        )
        with pytest.raises(SyncError, match=rf"1 of \d+ compared tensors differ .*: {stale}"):
            check_weights(engine, weights(other), version=1, num_tensors=1000)


def test_completions_do_not_depend_on_the_batch(engine: VLLMEngine) -> None:
    requests = make_requests(n=3)
    together = engine.generate(requests)
    backwards = engine.generate(requests[::-1])[::-1]
    alone = [
        [engine.generate([replace(request, n=1, seed=request.seed + i)])[0][0] for i in range(3)]
        for request in requests
    ]
    for row, *others in zip(together, backwards, alone, strict=True):
        for other in others:
            assert [completion.token_ids for completion in row] == [
                completion.token_ids for completion in other
            ]
    assert len({completion.token_ids for row in together for completion in row}) == 12


def test_more_prompt_tokens_than_one_pass_takes(engine: VLLMEngine) -> None:
    """A prompt cut in two would draw twice for its first token.

    On a CPU, vLLM fails when it reverts the first draw.
    """
    room = engine._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    numbers = torch.Generator().manual_seed(2)
    requests = [
        GenerationRequest(
            task_id=f"d:{i}",
            prompt_ids=tuple(torch.randint(1, 500, (301,), generator=numbers).tolist()),
            n=1,
            seed=i,
            sampling=SAMPLING,
        )
        for i in range(room // 301 + 2)
    ]
    together = engine.generate(requests)
    if engine.dtype == torch.float32:  # in bf16, another batch may decide a near tie
        at_the_border = [room // 301 - 1, room // 301, room // 301 + 1]
        for index in at_the_border:
            assert engine.generate([requests[index]])[0][0].token_ids == together[index][0].token_ids


def test_n_completions_are_n_requests_with_the_next_seeds(engine: VLLMEngine) -> None:
    """`GenerationRequest` promises the seed ``seed + i``.

    vLLM derives the seeds of n > 1 itself, and a version that does it differently fails here.
    """
    if engine.dtype != torch.float32:
        pytest.skip("in bf16 another batch rounds differently, which may decide a near tie")
    requests = make_requests(n=5)
    rows = engine.generate(requests)
    alone = [
        [engine.generate([replace(request, n=1, seed=request.seed + i)])[0][0] for i in range(5)]
        for request in requests
    ]
    for row, others in zip(rows, alone, strict=True):
        assert [completion.token_ids for completion in row] == [completion.token_ids for completion in others]
        for completion, other in zip(row, others, strict=True):
            assert completion.rollout_logprobs == pytest.approx(other.rollout_logprobs, abs=1e-4)
    assert len({completion.token_ids for row in rows for completion in row}) == 20
    (shifted,) = engine.generate([replace(requests[0], seed=requests[0].seed + 2)])
    assert [completion.token_ids for completion in shifted[:3]] == [
        completion.token_ids for completion in rows[0][2:]
    ]


def test_prompts_of_a_document_come_from_the_cache_as_far_as_whole_blocks_allow(
    engine: VLLMEngine, policy
) -> None:
    block = engine._llm.llm_engine.vllm_config.cache_config.block_size
    assert block == 32
    document = tuple(range(1, 400))
    # By hand: (completions - 1) x whole blocks of each prompt, and what the prompt shares with the previous
    # position. 96 tokens are 3 whole blocks, the last of which is computed again for the last token's logits.
    lengths, n = (70, 96, 100, 203), 3
    shareable = (0 + 2 * 64) + (64 + 2 * 64) + (96 + 2 * 96) + (96 + 2 * 192)
    requests = [
        GenerationRequest(task_id="d", prompt_ids=document[:length], n=n, seed=length, sampling=SAMPLING)
        for length in lengths
    ]
    before = engine.prompt_tokens
    engine.generate(requests)
    first = engine.prompt_tokens - before
    assert (first.total, first.shareable) == (n * sum(lengths), shareable)
    assert first.cached == shareable  # the engine is idle and its cache has room, so nothing is lost
    engine.generate(requests)  # a second part of the same groups finds everything in the cache
    second = engine.prompt_tokens - before - first
    assert second.cached == second.shareable == n * (64 + 64 + 96 + 192)
    engine.update_weights(weights(policy), version=1)  # clears the cache
    before = engine.prompt_tokens
    engine.generate(requests)
    assert engine.prompt_tokens - before == first


def test_a_first_box_ends_generation_itself(
    engine: VLLMEngine, policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept tokens and log-probs are those of the whole completion, and the engine stops after them."""
    if engine.dtype != torch.float32:
        pytest.skip("in bf16 another batch rounds differently, which may decide a near tie")
    monkeypatch.setattr(engine, "_bytes_of", lambda token_id: (b"\\boxed{", b"}", b"x")[token_id % 3])
    sampling = replace(SAMPLING, max_tokens=150, stop_token_ids=())
    step, num_steps = engine._llm.llm_engine.step, [0]

    def counted():
        num_steps[0] += 1
        return step()

    monkeypatch.setattr(engine._llm.llm_engine, "step", counted)
    requests = make_requests(n=3, sampling=sampling)
    whole, steps_whole = engine.generate(requests), num_steps[0]
    cut = engine.generate(
        [replace(request, sampling=replace(sampling, stop_after_first_box=True)) for request in requests]
    )
    steps_cut = num_steps[0] - steps_whole
    longest = max(len(completion.token_ids) for row in cut for completion in row)
    assert longest < 100
    assert steps_whole >= 150
    assert longest <= steps_cut <= longest + 2
    for row, others in zip(cut, whole, strict=True):
        for completion, other in zip(row, others, strict=True):
            length = len(completion.token_ids)
            assert completion.token_ids == other.token_ids[:length]
            assert completion.rollout_logprobs == pytest.approx(other.rollout_logprobs[:length], abs=1e-4)
            assert extract_prediction(completion.text_bytes, think_close=None) is not None
            assert (
                extract_prediction(
                    b"".join(map(engine._bytes_of, completion.token_ids[:-1])), think_close=None
                )
                is None
            )
            assert completion.finish_reason == "stop"
    engine.update_weights(weights(policy), version=1)  # works, since nothing is left running


def test_an_error_amid_generation_leaves_the_engine_idle(
    engine: VLLMEngine, policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(token_id: int) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "_bytes_of", fails)
    with pytest.raises(ZeroDivisionError):
        engine.generate(make_requests(sampling=replace(SAMPLING, stop_after_first_box=True)))
    monkeypatch.undo()
    engine.update_weights(weights(policy), version=1)
    assert [len(row) for row in engine.generate(make_requests())] == [2, 2, 2, 2]


def test_completions_end_with_the_requests_stop_tokens_only(engine: VLLMEngine) -> None:
    (row,) = engine.generate(
        make_requests(num=1, n=48, sampling=replace(SAMPLING, temperature=2.0, max_tokens=24))
    )
    assert {completion.finish_reason for completion in row} == {"stop", "length"}
    for completion in row:
        stops = [token_id in SAMPLING.stop_token_ids for token_id in completion.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == (completion.finish_reason == "stop")
        assert len(completion.rollout_logprobs) == len(stops) == (len(stops) if stops[-1] else 24)
        body = completion.token_ids[:-1] if stops[-1] else completion.token_ids
        assert completion.text_bytes == b"".join(engine._bytes_of(token_id) for token_id in body)
        assert completion.policy_version == 0


def test_old_keys_and_values_are_forgotten_with_the_old_weights(
    engine: VLLMEngine, policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_policy(policy.config, seed=1)
    requests = make_requests()  # two of the prompts are longer than vLLM's block of 128 tokens on CPU
    engine.generate(requests)
    engine.update_weights(weights(other), version=1)
    check_logprobs(difference(other, engine, requests), LOGPROB_LIMITS[engine.dtype], version=1)
    # The test can fail: if the reset does nothing, the stale cache shows.
    monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    engine.update_weights(weights(policy), version=2)
    with pytest.raises(SyncError):
        check_logprobs(difference(policy, engine, requests), LOGPROB_LIMITS[engine.dtype], version=2)
    monkeypatch.undo()
    engine._llm.reset_prefix_cache()
