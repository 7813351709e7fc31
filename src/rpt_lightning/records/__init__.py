"""What a run leaves on disk, one record each."""
