"""vLLM in the trainer's process."""
