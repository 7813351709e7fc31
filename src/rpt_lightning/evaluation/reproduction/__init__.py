"""One seed of the reproduction, and all seeds together."""
