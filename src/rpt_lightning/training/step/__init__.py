"""The rollouts of a training step."""
