"""Reinforcement Pre-Training (arXiv:2506.08007) on Lightning.

Importing the package loads neither vllm nor litdata nor lightning.
"""

__version__ = "0.1.0"
