"""What a policy can do on held-out text, compared in pairs, as a table and as a picture."""
