"""A module that a process does not finish importing."""

from __future__ import annotations

import time

time.sleep(60)
