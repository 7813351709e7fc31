"""Fixtures for all tests. scripts/make_model.py makes the tiny model, also for configs/debug.yaml."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# Examples are not timed: on a busy machine the first one takes longer than Hypothesis allows.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument.

    A time stamp in them (gzip writes one) would give each of two workers other tests, which ends the test
    run.
    """
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left():
    """Fail the file whose tests leave torch's process group behind, not the later file that finds it."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("a test of this file, or one of its fixtures, left torch's process group initialized")


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random Llama (1M parameters, vocabulary 512, tied embeddings). Only read it.

    It has a byte-level tokenizer, eos and chat template.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    load_script("make_model").make("tiny", folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_task_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task folder that `rpt prepare` made from docstrings of the standard library. Only read it.

    The tiny model is its proxy.
    """
    from rpt_lightning.data.prepare.prepare_command import prepare
    from rpt_lightning.data.sources.corpus import DocstringSource

    folder = tmp_path_factory.mktemp("tasks") / "tiny"
    prepare(
        DocstringSource("unittest"),
        str(folder),
        tokenizer=str(tiny_model_dir),
        proxy=str(tiny_model_dir),
        entropy_threshold=0.5,
        min_context=4,
        max_tokens_per_document=64,
        max_documents=24,
        heldout_documents=4,
        window=256,
        overlap=64,
        precision="32-true",
    )
    return folder


@pytest.fixture
def offline_policy(tiny_model_dir, monkeypatch):
    """Replace policies and tokenizers with a hub id by the tiny model, to test configs without a hub."""
    from rpt_lightning.policy import model

    load = model._load
    monkeypatch.setattr(
        model, "_load", lambda auto_class, path, **kwargs: load(auto_class, str(tiny_model_dir), **kwargs)
    )


@pytest.fixture(scope="session")
def answering_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, taught to answer "What is a - b?" with a box that holds 4 or 5. Only read it.

    Each answer is equally frequent.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rpt_lightning.objectives.prompts.template import QuestionPrompt
    from rpt_lightning.objectives.question_text import question_text
    from rpt_lightning.pretrained.token_bytes import TokenBytes
    from rpt_lightning.types import Question

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    encode, prompt = TokenBytes(tokenizer).encode_plain, QuestionPrompt().bind(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rows = []
    for number in range(4):
        question = Question(question_id="", text=f"What is {number + 4} - {number}?", answer="")
        prompt_ids = prompt.prompt_ids(encode(question_text(question)))
        rows += [(prompt_ids, prompt.completion_ids(encode("?"), encode(answer))) for answer in "45"]
    width = max(len(prompt_ids) + len(completion_ids) for prompt_ids, completion_ids in rows)
    input_ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for row, (prompt_ids, completion_ids) in enumerate(rows):
        end = len(prompt_ids) + len(completion_ids)
        input_ids[row, :end] = torch.tensor(prompt_ids + completion_ids)
        labels[row, len(prompt_ids) : end] = torch.tensor(completion_ids)
    for _ in range(60):
        loss = model(
            input_ids, labels=labels
        ).loss  # padding stands behind, where causal attention does not look
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("models") / "answering"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
