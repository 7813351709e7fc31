"""What a prefix cache could serve at best: the bound that a real engine's cache is measured against."""

from __future__ import annotations

from rpt_lightning.types import TokenIds


class UnlimitedPrefixCache:
    """Keeps the whole blocks of every prompt it has seen; shares what vLLM shares.

    vLLM shares whole blocks from the prompt's beginning on, and always computes at least the last token of a prompt, since its logits are needed:
    a prompt that consists of whole blocks pays the last of them again. What completions leave in a real cache is not counted here; it helps only
    where a completion happens to repeat the document.

    Args:
        block_size: Tokens of a block.
    """

    def __init__(self, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.block_size = block_size
        self._blocks: dict[
            tuple[int, TokenIds], int
        ] = {}  # (number of the block before it, its tokens) -> its number

    def serve(self, prompt_ids: TokenIds, n: int = 1) -> int:
        """Prompt tokens that the cache could give to ``n`` completions of a prompt, one after the other; the prompt is then kept.

        >>> cache = UnlimitedPrefixCache(block_size=2)
        >>> cache.serve((1, 2, 3, 4, 5), n=3)    # the first completion pays everything, two others share (1, 2) and (3, 4)
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
