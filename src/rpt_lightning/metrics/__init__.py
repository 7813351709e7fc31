"""TorchMetrics for next-token accuracy and statistics of rollouts."""
