"""From text to tasks.

Here are the corpus sources, the split, the proxy's scores, the shards on disk and the training order.
"""
