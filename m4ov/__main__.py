"""``python -m m4ov``."""

from __future__ import annotations

import sys

from m4ov.cli import main

if __name__ == "__main__":
    sys.exit(main())
