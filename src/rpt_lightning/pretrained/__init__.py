"""What lies in a Hugging Face folder, read so that nothing of it is taken on trust."""
