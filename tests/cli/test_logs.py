import io
import logging
import sys

from bise.cli.logs import LineFormatter, configure, escaped


def _line(message, *args, error=None):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logger = logging.Logger("bise.test")
    logger.addHandler(handler)
    try:
        if error is not None:
            raise error
    except Exception:
        logger.exception(message, *args)
    else:
        logger.warning(message, *args)
    return stream.getvalue()


def test_a_message_is_one_line_of_fields():
    line = _line("event=x count=%d", 5)
    assert line.count("\n") == 1
    assert line.endswith("level=warning logger=bise.test event=x count=5\n")
    assert line.startswith("ts=")


def test_nobody_can_forge_a_line():
    line = _line("event=x name=%s", "a\nts=2026 level=error event=forged\r\x1b[2J\u2028")
    assert line.count("\n") == 1
    assert line.splitlines() == [line.rstrip("\n")]
    assert "\x1b" not in line
    assert "\\n" in line


def test_an_exception_tells_its_kind_and_place_but_not_its_words():
    line = _line("event=failed", error=ValueError("the user's own text"))
    assert "exception=ValueError at=test_logs.py:" in line
    assert "own text" not in line
    assert line.count("\n") == 1


def test_printable_text_stays_as_it_is():
    assert escaped("event=x é 🙂") == "event=x é 🙂"


def test_the_level_holds_for_bise_and_others_stay_quiet(capsys):
    root, ours = logging.getLogger(), logging.getLogger("bise")
    before = root.handlers[:], root.level, ours.level
    try:
        configure("info")
        logging.getLogger("bise.server").info("event=seen")
        logging.getLogger("bise.server").debug("event=unseen")
        logging.getLogger("uvicorn").info("event=foreign")
        sys.stderr.flush()
        error = capsys.readouterr().err
    finally:
        root.handlers[:], root.level, ours.level = before[0], before[1], before[2]
    assert "event=seen" in error
    assert "unseen" not in error
    assert "foreign" not in error
