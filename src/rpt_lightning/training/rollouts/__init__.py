"""The rollouts of a step."""
