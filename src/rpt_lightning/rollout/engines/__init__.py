"""Engines: they hold weights and complete prompts."""
