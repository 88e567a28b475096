"""The server's log: one line an event on standard error, `key=value`, never a user's text."""

from __future__ import annotations

import logging
import sys
import time


class LineFormatter(logging.Formatter):
    """Writes `ts=... level=... logger=... event=...`; what would break the line is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, and a traceback of ours below it, indented."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        head = f"ts={stamp}.{int(record.msecs):03d}Z level={record.levelname.lower()} logger={record.name}"
        line = f"{head} {escaped(record.getMessage())}"
        if record.exc_info and record.exc_info[0] is not None:
            # The message of a foreign exception may quote what a user sent; its kind and place do not.
            line += f" exception={record.exc_info[0].__name__}{_place(record.exc_info[2])}"
        return line


def escaped(text: str) -> str:
    """Return text without line breaks or other control characters, so that nobody can forge a line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def configure(level: str) -> None:
    """Send the log to standard error, from `level` (debug, info, warning, error) up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("bise").setLevel(level.upper())


def _place(traceback: object) -> str:
    """Return where an exception came from: the innermost file and line."""
    import types

    frame = None
    while isinstance(traceback, types.TracebackType):
        frame, traceback = traceback, traceback.tb_next
    if frame is None:
        return ""
    code = frame.tb_frame.f_code
    return f" at={code.co_filename.rpartition('/')[2]}:{frame.tb_lineno}:{code.co_name}"
