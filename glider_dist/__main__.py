"""``python -m glider_dist`` is the console script ``glider-dist``."""

import sys

from glider_dist.cli import main

sys.exit(main())
