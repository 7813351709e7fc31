"""Where text and questions come from."""
