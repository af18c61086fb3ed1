"""``python -m igpt`` is the same as ``igpt``."""

import sys

from igpt.commands.main import main

sys.exit(main())
