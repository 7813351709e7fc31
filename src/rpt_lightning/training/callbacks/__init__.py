"""Lightning callbacks, each with one side effect."""
