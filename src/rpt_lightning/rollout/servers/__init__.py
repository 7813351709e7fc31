"""vLLM on servers."""
