"""How the policy is prompted and rewarded."""
