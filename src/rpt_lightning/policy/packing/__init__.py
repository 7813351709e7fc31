"""Packs sequences into trees or rows."""
