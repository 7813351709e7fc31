"""From text to tasks: corpus sources, the split, the proxy's scores, shards on disk and the order in which they are trained."""
