"""What the policy is asked at a place in a text, how its completion is read, and what it earns."""
