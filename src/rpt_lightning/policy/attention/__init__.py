"""Attention over packed trees."""
