"""Keys and passwords stay out of what a run writes down about itself."""

from __future__ import annotations

import re
from typing import Any

REDACTED = "(secret, not saved)"
_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|password|passwd|secret(_?(access_?)?key)?|access_?key|credentials?|(auth|access|hf|api|bearer)_?token)$",
    re.IGNORECASE,
)
_USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")


def redact(config: Any) -> Any:
    """The same configuration with ``REDACTED`` for every text whose name says that it is a secret, and for user and password in a URL.

    >>> redact({"rollout": {"api_key": "abc", "urls": ["http://me:pw@host:8000"]}})
    {'rollout': {'api_key': '(secret, not saved)', 'urls': ['http://(secret, not saved)@host:8000']}}
    >>> redact({"aws_secret_access_key": "abc", "access_key": "abc", "tokens_per_step": "abc"})
    {'aws_secret_access_key': '(secret, not saved)', 'access_key': '(secret, not saved)', 'tokens_per_step': 'abc'}
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
