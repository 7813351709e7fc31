"""TorchMetrics of next-token accuracy and of rollouts."""
