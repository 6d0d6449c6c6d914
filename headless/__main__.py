"""``python -m headless`` is ``mosaic-headless``."""

import sys

from headless.cli import main

if __name__ == "__main__":
    sys.exit(main())
