"""Weight sync, and whether engine and policy agree."""
