"""A task folder in S3-compatible storage.

Files are fetched by litdata's client when they are first needed, and compared with their checksums.

The storage is configured as in boto3. AWS_ENDPOINT_URL_S3 (or AWS_ENDPOINT_URL) gives the address if the
storage is not Amazon's. AWS_ACCESS_KEY_ID and its companions, or a profile, give the key. No key is therefore
in a configuration. Copies are kept in RPT_CACHE_DIR (default ~/.cache/rpt-lightning), which the ranks of a
machine share. No copy is deleted.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from rpt_lightning.compat.litdata import INDEX_FILE, s3_fetcher
from rpt_lightning.data.store.manifest import MANIFEST_FILE, parse_manifest
from rpt_lightning.data.store.shards import NUM_POSITIONS_FILE, file_sha256, replace_file

PREFIX = "s3://"


def is_remote(path: str | Path) -> bool:
    """Whether ``path`` is in remote storage. Raises ValueError if the kind of storage is not supported."""
    scheme, mark, _ = str(path).partition("://")
    if mark and scheme + mark != PREFIX:
        raise ValueError(
            f"task folder {path}: of remote storage only {PREFIX}bucket/folder is read; "
            "copy the folder to this machine, or serve it as S3"
        )
    return bool(mark)


class RemoteFolder:
    """A task folder in remote storage, with a local copy at ``path``.

    The manifest and the tokenizer are there from the start. ``fetch_split`` fetches the files of a split, and
    ``fetch`` its chunks. A copy belongs to one manifest: a folder that was prepared again under the same
    address gets a new copy.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        manifest = self._read(MANIFEST_FILE)
        name = hashlib.sha256(self.url.encode() + manifest).hexdigest()[:16]
        self.path = (
            Path(os.environ.get("RPT_CACHE_DIR", "~/.cache/rpt-lightning")).expanduser() / "tasks" / name
        )
        self._sha256 = parse_manifest(manifest, f"{self.url}/{MANIFEST_FILE}").sha256
        for tokenizer_file in self._sha256["tokenizer"]:
            self.fetch("tokenizer", tokenizer_file)
        replace_file(self.path / MANIFEST_FILE, lambda path: path.write_bytes(manifest))

    def fetch_split(self, split: str) -> None:
        """Fetch all files of a split except its chunks."""
        self.fetch(split, INDEX_FILE)
        self.fetch(split, NUM_POSITIONS_FILE)

    def fetch(self, part: str, name: str) -> Path:
        """Return a complete local file of a split or the tokenizer, from an earlier run or freshly fetched.

        Raises:
            ValueError: If the storage does not have the file, or has another one than the manifest says.
        """
        from filelock import FileLock

        sha256 = self._sha256[part].get(name)
        # litdata's index has no checksum; check_split examines it.
        if Path(name).name != name or (sha256 is None and name != INDEX_FILE):
            raise ValueError(
                f"{self.url}/{part} names a file {name!r}, which its manifest does not hold; "
                "make the folder again with `rpt prepare`"
            )
        path = self.path / part / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # another rank of this machine may be fetching it
            if path.is_file() and (sha256 is None or file_sha256(path) == sha256):
                return path
            content = self._read(f"{part}/{name}")
            if sha256 not in (None, hashlib.sha256(content).hexdigest()):
                raise ValueError(
                    f"{self.url}/{part}/{name} is damaged: its SHA-256 is not the one that `rpt prepare` "
                    "wrote into the manifest; upload it again"
                )
            replace_file(path, lambda temporary: temporary.write_bytes(content))
        return path

    @cached_property
    def _download(self) -> Callable[[str, BinaryIO], None]:
        from botocore.config import Config

        # boto3's own setting for the number of attempts, AWS_MAX_ATTEMPTS, defaults to a few.
        return s3_fetcher(self.url, Config())

    def _read(self, name: str) -> bytes:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        buffer = io.BytesIO()
        try:
            self._download(f"{self.url}/{name}", buffer)
        except (BotoCoreError, ClientError, Boto3Error) as error:
            raise ValueError(
                f"{self.url}/{name} cannot be fetched ({error}); check the address, AWS_ENDPOINT_URL_S3 "
                "for a storage that is not Amazon's, and the key (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                "or AWS_PROFILE)"
            ) from error
        return buffer.getvalue()
