"""Read a Hugging Face folder without trusting that its parts agree."""
