"""The folder of a run: made, checked and claimed before any work is done."""

from __future__ import annotations

import fcntl
import json
import tempfile
from pathlib import Path
from typing import Any

from m4ov.data.whole import write_whole


class RunFolderError(OSError):
    """The run folder cannot be used; the message says why and what to do."""


class RunFolder:
    """A folder that this process alone writes to.

    Args:
        path: made if it is not there.
        fingerprint: what the training depends on. A folder that holds another training is refused.

    Raises:
        RunFolderError: it cannot be made or written, another process uses it, or it holds another run.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, Any]) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held as long as the process lives
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.path}: cannot be written ({error.strerror}); choose another with run.folder=PATH"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RunFolderError(f"run folder {self.path}: another process is running in it") from None
        try:
            self.claim(fingerprint)
        except OSError:
            self._lock.close()
            raise

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def claim(self, fingerprint: dict[str, Any], name: str = "run.json") -> None:
        """What the training depends on, or what is known of that later, in a file of its own (``name``).

        Raises:
            RunFolderError: the folder holds a run of which this is another; says of what, there and now.
        """
        fingerprint = json.loads(json.dumps(fingerprint))
        file = self.path / name
        if not file.exists():
            write_whole(file, json.dumps(fingerprint, indent=1))
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"run folder {self.path}: {file.name} cannot be read ({error})") from error
        changed = [name for name in sorted({*found, *fingerprint}) if found.get(name) != fingerprint.get(name)]
        if changed:
            what = ", ".join(f"{name} ({found.get(name)} there, {fingerprint.get(name)} now)" for name in changed[:4])
            raise RunFolderError(
                f"run folder {self.path} holds a run with another {what}; "
                "remove the folder, or choose another with run.folder=PATH"
            )

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.close()
