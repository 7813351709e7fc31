"""Train from a task folder in storage, with a real S3 server (moto's) on loopback.

The tasks must be those of the folder itself.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule
from rpt_lightning.data.store.task_folder import TaskFolder

# If the project's environment lacks moto, name another one: RPT_MOTO_SERVER=/path/to/bin/moto_server
MOTO_SERVER = os.environ.get("RPT_MOTO_SERVER") or shutil.which("moto_server")
URL = "s3://corpora/deep/tasks"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        MOTO_SERVER is None, reason="no moto_server (pip install 'moto[server]'), so S3 was not tested"
    ),
]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [MOTO_SERVER, "-H", "127.0.0.1", "-p", str(port)], stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the S3 server does not answer"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def storage(endpoint, monkeypatch, tmp_path):
    """Return ``storage(folder)``, which uploads it to URL in an empty bucket with boto3's own client."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL_S3": endpoint, "AWS_ACCESS_KEY_ID": "only-for", "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "2", "RPT_CACHE_DIR": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="corpora")

    def upload(folder: Path):
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "corpora", f"deep/tasks/{path.relative_to(folder)}")
        return client

    yield upload
    for item in client.list_objects_v2(Bucket="corpora").get("Contents", []):
        client.delete_object(Bucket="corpora", Key=item["Key"])
    client.delete_bucket(Bucket="corpora")


@pytest.fixture(scope="session")
def many_chunks(tiny_model_dir, tmp_path_factory):
    """A prepared folder whose train split has several chunks."""
    from rpt_lightning.data.prepare.prepare_command import prepare
    from rpt_lightning.data.sources.corpus import DocstringSource

    folder = tmp_path_factory.mktemp("tasks") / "chunks"
    prepare(
        DocstringSource("unittest"), str(folder), tokenizer=str(tiny_model_dir), proxy=str(tiny_model_dir),
        entropy_threshold=0.5, min_context=4, max_tokens_per_document=64, max_documents=24,
        heldout_documents=4, window=256, overlap=64, precision="32-true", chunk_bytes="16KB",
    )  # fmt: skip
    return folder


def steps(task_dir, num: int, state=None):
    """Return the tasks of ``num`` steps and the state after them."""
    data = TokenTaskDataModule(str(task_dir), tasks_per_step=8, positions_per_document=2, num_eval_tasks=8)
    data.setup("fit")
    if state is not None:
        data.stream.load_state_dict(state)
    batches = iter(data.train_dataloader())
    return [next(batches).tasks for _ in range(num)], data.stream.state_dict(), data


def test_a_run_from_storage_trains_on_the_same_tasks(many_chunks, storage, tmp_path):
    storage(many_chunks)
    local, place, at_home = steps(many_chunks, 6)
    remote, remote_place, elsewhere = steps(URL, 6)
    assert remote == local
    assert remote_place == place
    assert elsewhere.eval_tasks() == at_home.eval_tasks()
    assert elsewhere.train.tokenizer_hash == at_home.train.tokenizer_hash
    # A run may resume from the other place, since the data is identified by its fingerprint.
    assert steps(URL, 2, place)[0] == steps(many_chunks, 2, place)[0]


def test_only_chunks_that_are_used_are_fetched_and_only_once(many_chunks, storage, tmp_path):
    client = storage(many_chunks)
    folder = TaskFolder(URL, "train")
    assert len(folder.chunk_sizes) > 2
    assert list((tmp_path / "cache").rglob("*.bin")) == []
    folder.document(0)
    (first,) = (tmp_path / "cache").rglob("*.bin")
    folder.document(len(folder) - 1)
    assert len(list((tmp_path / "cache").rglob("*.bin"))) == 2
    # The next start on this machine fetches no chunk again, except to repair a local copy that is damaged.
    first.write_bytes(first.read_bytes()[:-1] + b"?")
    before = first.read_bytes()
    assert TaskFolder(URL, "train").document(0)["doc_id"] == folder.document(0)["doc_id"]
    assert first.read_bytes() != before
    client.delete_object(Bucket="corpora", Key=f"deep/tasks/train/{first.name}")
    assert TaskFolder(URL, "train").document(0)["doc_id"] == folder.document(0)["doc_id"]


def test_a_chunk_that_is_damaged_in_storage_is_named(many_chunks, storage):
    client = storage(many_chunks)
    key = "deep/tasks/train/chunk-0-0.bin"
    content = bytearray(client.get_object(Bucket="corpora", Key=key)["Body"].read())
    content[-40] ^= 0x10
    client.put_object(Bucket="corpora", Key=key, Body=bytes(content))
    folder = TaskFolder(URL, "train")
    with pytest.raises(
        ValueError,
        match=r"s3://corpora/deep/tasks/train/chunk-0-0\.bin is damaged: its SHA-256.*upload it again",
    ):
        folder.document(0)
    client.delete_object(Bucket="corpora", Key=key)
    with pytest.raises(ValueError, match=r"chunk-0-0\.bin cannot be had .*AWS_ENDPOINT_URL_S3"):
        folder.document(0)


def test_storage_that_is_not_there_or_not_meant(storage, monkeypatch):
    with pytest.raises(ValueError, match=r"s3://corpora/nothing/manifest\.json cannot be had"):
        TaskFolder("s3://corpora/nothing", "train")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"cannot be had \(Could not connect to the endpoint URL"):
        TaskFolder(URL, "train")
    with pytest.raises(ValueError, match="task folder gs://corpora/tasks: of remote storage only s3://"):
        TaskFolder("gs://corpora/tasks", "train")
