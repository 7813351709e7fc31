"""Models that judge whether a predicted segment means what the text says."""
