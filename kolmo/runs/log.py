"""The log of a run."""

import logging
import os
from pathlib import Path
from typing import TextIO

from kolmo.files import appending

LOGGER = logging.getLogger("kolmo")


class LogFile(logging.FileHandler):
    """A log that is left short where the disk is full: it must neither end the run nor show a trace."""

    def _open(self) -> TextIO:  # type: ignore[override]
        return os.fdopen(appending(Path(self.baseFilename)), "a", encoding="utf-8", errors="replace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """Say nothing."""
