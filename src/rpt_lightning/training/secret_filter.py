"""Keeps keys and passwords out of a run's records about itself."""

from __future__ import annotations

import re
from typing import Any

REDACTED = "(secret, not saved)"
_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|password|passwd|secret(_?(access_?)?key)?|access_?key|credentials?|"
    r"(auth|access|hf|api|bearer)_?token)$",
    re.IGNORECASE,
)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


def redact(config: Any) -> Any:
    """Copy a configuration without its secrets.

    Each text whose name marks it as a secret is replaced by ``REDACTED``, and so are user and password in a
    URL.

    >>> redact({"rollout": {"api_key": "abc", "urls": ["http://me:pw@host:8000"]}})
    {'rollout': {'api_key': '(secret, not saved)', 'urls': ['http://(secret, not saved)@host:8000']}}
    >>> redact({"aws_secret_access_key": "abc", "access_key": "abc", "tokens_per_step": "abc"}) == {
    ...     "aws_secret_access_key": REDACTED, "access_key": REDACTED, "tokens_per_step": "abc"}
    True
    """
    if isinstance(config, dict):
        return {
            key: REDACTED
            if value and isinstance(value, str) and _SECRET_NAME.search(str(key))
            else redact(value)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [redact(value) for value in config]
    return _USER_IN_URL.sub(REDACTED, config) if isinstance(config, str) else config
