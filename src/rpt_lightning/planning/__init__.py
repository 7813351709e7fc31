"""What a run will cost, worked out from its configuration before it starts."""
