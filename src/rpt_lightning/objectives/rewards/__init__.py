"""What completions earn."""
