"""Small worlds whose texts have tokens that can be worked out.

They serve to demonstrate, measure and stress next-token reasoning.
"""

from rpt_lightning.worlds.boxes import Boxes
from rpt_lightning.worlds.cups import Cups
from rpt_lightning.worlds.origins import Origins
from rpt_lightning.worlds.people import People
from rpt_lightning.worlds.whole_sentences import SentenceAnswers, SentenceChoices
from rpt_lightning.worlds.world import Answer, World

__all__ = [
    "Answer",
    "Boxes",
    "Cups",
    "Origins",
    "People",
    "SentenceAnswers",
    "SentenceChoices",
    "World",
]
