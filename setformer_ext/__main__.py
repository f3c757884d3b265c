"""``python -m setformer_ext`` is the command ``setformer``."""

import sys

from .cli import main

sys.exit(main())
