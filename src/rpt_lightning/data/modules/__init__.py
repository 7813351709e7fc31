"""Lightning data modules: they hand tasks, sequences and held-out tasks to the trainer."""
