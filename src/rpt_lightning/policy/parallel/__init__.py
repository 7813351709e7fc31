"""The policy on several devices."""
