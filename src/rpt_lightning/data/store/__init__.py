"""The task folder on disk."""
