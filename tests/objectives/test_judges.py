"""The judges: a server of the OpenAI form, and a model in this process."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rpt_lightning.objectives.judges import server_judge
from rpt_lightning.objectives.judges.local_judge import LocalJudge
from rpt_lightning.objectives.judges.server_judge import ServerJudge


class Stub:
    """A server that answers with what ``answer(body, headers)`` says: status, content and seconds to wait."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict, str | None]] = []
        self.answer = lambda body: (200, said(f"about {body['messages'][0]['content']}"), 0.0)
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append((self.path, body, self.headers.get("Authorization")))
                status, content, wait_s = stub.answer(body)
                time.sleep(wait_s)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def said(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(server_judge, "RETRY_S", 0.0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    stub = Stub()
    yield stub
    stub.server.shutdown()
    stub.server.server_close()


def test_a_server_is_asked_in_the_form_of_openai(stub, monkeypatch):
    judge = ServerJudge(f"{stub.url}/", "small", max_reply_tokens=7)
    assert judge.replies(["a", "b", "c"], attempt=0) == ["about a", "about b", "about c"]
    assert {path for path, _, _ in stub.requests} == {"/v1/chat/completions"}
    assert {key for _, _, key in stub.requests} == {None}
    (body,) = [body for _, body, _ in stub.requests if body["messages"][0]["content"] == "a"]
    assert body == {
        "model": "small",
        "messages": [{"role": "user", "content": "a"}],
        "temperature": 0.0,
        "max_tokens": 7,
    }
    # The second time it draws another reply, with the key that the environment has.
    monkeypatch.setenv("MY_KEY", "secret")
    ServerJudge(stub.url, "small", api_key_env="MY_KEY").replies(["d"], attempt=1)
    _, body, key = stub.requests[-1]
    assert (body["temperature"], key) == (1.0, "Bearer secret")


def test_an_error_that_passes_is_tried_once_more(stub):
    answers = iter([(503, b"busy", 0.0), (200, said("Score: 1"), 0.0)])
    stub.answer = lambda body: next(answers)
    assert ServerJudge(stub.url, "small").replies(["a"], attempt=0) == ["Score: 1"]
    assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("answer", "message", "num_requests"),
    [
        ((503, b"busy", 0.0), r"refuses the request \(503: busy\)", 2),
        ((401, b"no", 0.0), "refuses our key; set the environment variable OPENAI_API_KEY", 1),
        ((404, b"what?", 0.0), "there is no model 'small' or no /chat/completions", 1),
        ((200, b"<html>", 0.0), "not in the form of OpenAI's chat completions.*<html>", 1),
        ((200, b'{"choices": []}', 0.0), "not in the form of OpenAI's chat completions", 1),
        ((200, said("late"), 0.5), r"does not answer \(timed out\).*timeout_s 0.1", 2),
    ],
)
def test_one_clear_error(stub, answer, message, num_requests):
    stub.answer = lambda body: answer
    with pytest.raises(ValueError, match=message) as raised:
        ServerJudge(stub.url, "small", timeout_s=0.1).replies(["a"], attempt=0)
    assert f"--rollout.objective.reward.judge.url {stub.url}" in str(raised.value)
    assert len(stub.requests) == num_requests


def test_a_server_that_is_not_there(stub):
    stub.server.shutdown()
    stub.server.server_close()
    with pytest.raises(ValueError, match=r"the judge does not answer .*refused.*Is the server running"):
        ServerJudge(stub.url, "small").replies(["a", "b"], attempt=0)


def test_a_reply_without_text_has_no_verdict(stub):
    stub.answer = lambda body: (200, said(None), 0.0)
    assert ServerJudge(stub.url, "small").replies(["a"], attempt=0) == [""]


def test_a_model_in_this_process(tiny_model_dir):
    """It writes what transformers writes for each prompt alone, whatever stands beside it in the batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["Is it so?", "A much longer question, is it not?", "Why?"]
    judge = LocalJudge(str(tiny_model_dir), dtype="float32", device="cpu", max_reply_tokens=5, batch_size=2)
    replies = judge.replies(prompts, attempt=0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=False,
        )
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        assert reply == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert judge.replies(prompts, attempt=0) == replies
    assert judge.replies(prompts, attempt=1) != replies  # another draw
    assert judge.replies([], attempt=0) == []


def test_a_model_that_is_not_there_or_cannot_chat(tiny_model_dir, tmp_path):
    with pytest.raises(ValueError, match=r"judge\.model .*nothing: its tokenizer cannot be loaded"):
        LocalJudge(str(tmp_path / "nothing")).replies(["a"], attempt=0)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="no chat template, so it cannot be asked; give a chat model"):
        LocalJudge(str(tmp_path / "base")).replies(["a"], attempt=0)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"judge\.model .*empty: it cannot be loaded"):
        LocalJudge(str(tmp_path / "empty")).replies(["a"], attempt=0)


def test_refused_options():
    with pytest.raises(ValueError, match=r"judge\.url localhost:8000: give an address such as http"):
        ServerJudge("localhost:8000", "small")
    with pytest.raises(ValueError, match="num_parallel 0: must be at least 1"):
        ServerJudge("http://localhost:8000/v1", "small", num_parallel=0)
    with pytest.raises(ValueError, match="timeout_s 0: must be above 0"):
        ServerJudge("http://localhost:8000/v1", "small", timeout_s=0)
    with pytest.raises(ValueError, match="batch_size 0: must be at least 1"):
        LocalJudge("models/judge", batch_size=0)
