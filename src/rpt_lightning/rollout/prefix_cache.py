"""An upper bound on what a prefix cache can serve, with which a real engine's cache is compared."""

from __future__ import annotations

from rpt_lightning.types import TokenIds


class UnlimitedPrefixCache:
    """A cache that keeps the whole blocks of every prompt and shares what vLLM would share.

    vLLM shares whole blocks from the start of a prompt. It always computes at least the last token of a
    prompt, since its logits are needed. A prompt that consists of whole blocks therefore computes its last
    block again. Blocks that completions leave in a real cache are not counted. They help only if a completion
    happens to repeat the document.

    Args:
        block_size: Tokens in a block.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.block_size = block_size
        # (number of the previous block, tokens of the block) -> number of the block
        self._blocks: dict[tuple[int, TokenIds], int] = {}

    def serve(self, prompt_ids: TokenIds, n: int = 1) -> int:
        """Return how many prompt tokens the cache could provide to ``n`` consecutive completions of a prompt.

        The prompt is then added to the cache. In the example, the first completion computes everything, and
        the other two share (1, 2) and (3, 4).

        >>> cache = UnlimitedPrefixCache(block_size=2)
        >>> cache.serve((1, 2, 3, 4, 5), n=3)
        8
        >>> cache.serve((1, 2, 3, 9))
        2
        """
        size = self.block_size
        most = (len(prompt_ids) - 1) // size * size
        first = previous = 0
        for start in range(0, len(prompt_ids) - size + 1, size):
            key = (previous, prompt_ids[start : start + size])
            if key in self._blocks:
                first = min(start + size, most)
            previous = self._blocks.setdefault(key, len(self._blocks) + 1)
        return first + (n - 1) * most
