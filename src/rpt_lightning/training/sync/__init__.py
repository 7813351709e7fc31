"""Whether engine and policy agree."""
