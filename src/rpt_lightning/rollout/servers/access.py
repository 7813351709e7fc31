"""Find or make the key to a server.

The key is never in a config, a log or a command line. It is in the environment, or in a file that nobody else
can read.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def find_key(api_key_env: str, api_key_file: str | None) -> str | None:
    """Return the value of the environment variable, or else the content of the file, or None without either.

    Raises:
        ValueError: Others may read the file, or it is empty.
    """
    if key := os.environ.get(api_key_env, "").strip():
        return key
    if api_key_file is None or not Path(api_key_file).exists():
        return None
    mode = Path(api_key_file).stat().st_mode & 0o777
    if mode & 0o077:
        raise ValueError(
            f"api_key_file={api_key_file} may be read by others (mode "
            f"{mode:o}): chmod 600 it, and make a new key"
        )
    key = Path(api_key_file).read_text().strip()
    if not key:
        raise ValueError(
            f"api_key_file={api_key_file} is empty: delete it, and `rpt serve` will write a new one"
        )
    return key


def make_key(api_key_file: str) -> str:
    """Write a new random key to a new file of mode 600, and return it."""
    path = Path(api_key_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    key = secrets.token_hex(32)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key + "\n")
    return key
