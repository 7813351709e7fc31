"""Work out the cost of a run from its configuration before it starts."""
