"""``python -m rpt_lightning.cli`` is the ``rpt`` command."""

import sys

from rpt_lightning.cli import main

sys.exit(main())
