"""What the policy is asked and what it is paid for."""
