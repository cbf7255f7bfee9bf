"""One progress line: redrawn in place for a person, written now and then into a log.

Under torchrun the terminal belongs to the launcher. There the worker marks its progress lines (`RELAY`) and the
launcher, which knows whether a person is watching, shows them. No torch here: the launcher imports this.
"""

import logging
import os
import sys
import time
from typing import TextIO

RELAY = "BLIP_PIPELINES_PROGRESS"  # environment: seconds between the lines that a worker relays
MARK = "\x1eprogress\x1e"

logger = logging.getLogger(__name__)


class Progress:
    """Shows lines of which only the newest matters.

    Args:
        every_seconds: between two lines in a log; a terminal is redrawn at most ten times a second.
        stream: where a person would look; standard error if not given.
    """

    def __init__(self, every_seconds: float = 30.0, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        relay = os.environ.get(RELAY)
        self.relayed, self.drawn = relay is not None, False
        self.on_terminal = not self.relayed and self.stream.isatty()
        self.every_seconds = float(relay) if relay else 0.1 if self.on_terminal else every_seconds
        self._next = 0.0

    @property
    def due(self) -> bool:
        """Whether a line shown now would be seen; making one can be spared otherwise."""
        return time.monotonic() >= self._next

    def show(self, line: str, last: bool = False) -> None:
        """Show `line` if it is time for one; `last` lines always, and they stay."""
        if not (self.due or last):
            return
        self._next = time.monotonic() + self.every_seconds
        if self.relayed:
            print(f"{MARK}{'!' if last else ' '}{line}", flush=True)  # noqa: T201
        elif self.on_terminal:
            self.stream.write(f"\r\x1b[K{line}" + ("\n" if last else ""))
            self.stream.flush()
            self.drawn = not last
        else:
            logger.info(line)

    def relay(self, line: str) -> bool:
        """Show a line of a worker's output if it is a marked one; False if it is not."""
        if not line.startswith(MARK):
            return False
        body = line.removeprefix(MARK)
        self.show(body[1:], last=body.startswith("!"))
        return True

    def clear(self) -> None:
        """Take the drawn line away, so that other output starts on a clean one."""
        if self.drawn:
            self.stream.write("\r\x1b[K")
            self.stream.flush()
            self.drawn = False
