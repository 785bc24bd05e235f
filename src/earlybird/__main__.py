"""``python -m earlybird``: the command line."""

import sys

from earlybird.cli import main

if __name__ == "__main__":
    sys.exit(main())
