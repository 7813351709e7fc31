"""Checks mathematical answers."""
