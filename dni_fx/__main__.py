"""``python -m dni_fx``: the command ``dni-fx``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
