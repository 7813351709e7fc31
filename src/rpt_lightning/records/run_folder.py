"""Names of the files and folders in a run's folder, which training writes and evaluation reads."""

from __future__ import annotations

CONFIG_FILE = "config.yaml"
STEP_LOG = "steps.jsonl"
VALIDATION_FOLDER = "validation"
ROLLOUT_FOLDER = "rollouts"
ANSWER_FOLDER = "answers"
