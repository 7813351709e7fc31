"""Small worlds whose text has tokens that can be worked out: where next-token reasoning can be shown, measured and broken."""

from rpt_lightning.worlds.boxes import Boxes
from rpt_lightning.worlds.cups import Cups
from rpt_lightning.worlds.people import People
from rpt_lightning.worlds.world import Answer, World

__all__ = ["Answer", "Boxes", "Cups", "People", "World"]
