"""Small files that stand whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from m4ov.data.shards import replacing


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Replace a file at once, by way of a temporary name beside it; its folder is made if need be.

    Raises:
        WriteError: it cannot be written; what stood there before stands there still.
    """
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
