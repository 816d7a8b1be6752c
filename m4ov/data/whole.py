"""Small files that stand whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from m4ov.data.shards import WriteError


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Replace a file at once, by way of a temporary name beside it; its folder is made if need be.

    Raises:
        WriteError: it cannot be written; what stood there before stands there still.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # it is gone, or never was
            temporary.unlink()
