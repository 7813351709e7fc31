"""What `rpt prepare` does if its output folder already exists."""

from __future__ import annotations

import json
import shutil

from rpt_lightning.data.prepare.proxy_model import proxy_fingerprint
from rpt_lightning.data.prepare.settings import PrepareSettings
from rpt_lightning.data.prepare.tokenized_corpus import source_sha256
from rpt_lightning.data.store.manifest import MANIFEST_FILE, Manifest, read_manifest
from rpt_lightning.data.store.shards import check_split


def accept_finished(settings: PrepareSettings) -> None:
    """Report that the folder is already finished. Raises ValueError if it differs from what was asked for."""
    output = settings.output
    if not (output / MANIFEST_FILE).is_file():
        raise ValueError(
            f"--output_dir {output}: exists and is not a task folder; name another folder or remove it"
        )
    manifest = read_manifest(output)
    _check_same_settings(manifest, settings)
    _check_same_content(manifest, settings)
    try:
        for split in ("train", "heldout"):
            check_split(output / split)
    except ValueError as error:
        raise ValueError(
            f"--output_dir {output}: a task folder with the same settings, which cannot be read: "
            f"remove it or name another folder ({error})"
        ) from error
    # A run that was stopped at its very end may have left this folder.
    shutil.rmtree(settings.partial, ignore_errors=True)
    print(f"{output} is already finished, with the same settings: nothing to do", flush=True)


def _check_same_settings(manifest: Manifest, settings: PrepareSettings) -> None:
    made_with = manifest.all_settings
    for name, value in settings.stored.items():
        if made_with.get(name) != json.loads(json.dumps(value)):
            raise ValueError(
                f"--output_dir {settings.output}: a task folder made with other settings "
                f"({name} {made_with.get(name)!r} instead of {value!r}); "
                "it is not overwritten: remove it or name another folder"
            )


def _check_same_content(manifest: Manifest, settings: PrepareSettings) -> None:
    """Compare what the settings only name: the proxy's weights and the source's text."""
    if manifest.proxy_fingerprint not in (None, proxy_fingerprint(settings.proxy)):
        different = f"weights of --proxy {settings.proxy!r}"
    elif manifest.corpus.sha256 != source_sha256(settings.source):
        different = "text of --source"
    else:
        return
    raise ValueError(
        f"--output_dir {settings.output}: a task folder made with different {different}; "
        "remove it or name another folder"
    )
