"""Pure mathematics on tensors: no device, no process group, no logging."""
