"""What a run's folder holds for its readers: training writes it, evaluation reads it."""

from __future__ import annotations

CONFIG_FILE = "config.yaml"
STEP_LOG = "steps.jsonl"
VALIDATION_FOLDER = "validation"
ROLLOUT_FOLDER = "rollouts"
ANSWER_FOLDER = "answers"
