"""Rollouts: engines complete prompts, and the rollouter turns tasks into rewarded groups of completions."""
