"""Accuracy against training compute."""
