"""Rollouts: engines that complete prompts, and the rollouter that turns tasks into paid groups of completions."""
