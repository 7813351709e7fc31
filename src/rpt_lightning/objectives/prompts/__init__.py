"""How the policy is prompted."""
