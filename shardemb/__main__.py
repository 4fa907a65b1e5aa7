"""``python -m shardemb``."""

import sys

from shardemb.cli import main

sys.exit(main())
