"""Held-out evaluation of policies, with paired comparisons, tables and figures."""
