"""Checkpoints: written, checked and resumed."""
