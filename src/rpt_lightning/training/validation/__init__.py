"""The records of a validation."""
