"""What is logged is shown as it is asked for, and the log is afterwards as it was."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from unmoved.core import messages


def test_what_is_logged_inside_is_shown_from_information_on(capsys: pytest.CaptureFixture[str]) -> None:
    before, said = (messages.logger.level, list(messages.logger.handlers)), list[str]()
    with messages.shown(said.append), messages.shown():
        messages.logger.debug("no")
        messages.logger.info("%d of %s", 1, "two")
        messages.logger.warning("three")
    messages.logger.info("after")
    assert said == ["note: 1 of two", "note: three"]
    assert capsys.readouterr().err == "note: 1 of two\nnote: three\n"
    assert (messages.logger.level, messages.logger.handlers) == before
    assert messages.logger is logging.getLogger("unmoved")


def test_the_log_is_as_before_where_the_inside_fails() -> None:
    before = messages.logger.level, list(messages.logger.handlers)
    with pytest.raises(KeyboardInterrupt), messages.shown():
        raise KeyboardInterrupt
    assert (messages.logger.level, messages.logger.handlers) == before


def test_a_line_does_not_steer_the_terminal_and_is_short_enough_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    with messages.shown():
        messages.logger.warning("a\x1b[2Jb %s", "x" * 10_000)
    said = capsys.readouterr().err
    assert said.startswith("note: a\\x1b[2Jb xxx")
    assert said.endswith("x ...\n")
    assert len(said) < 5100


def test_a_program_that_asks_for_nothing_hears_of_damage_alone() -> None:
    code = (
        "import logging\nfrom unmoved.core.messages import logger\nlogger.info('frozen')\nlogger.warning('damaged')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert (done.stdout, done.stderr) == ("", "damaged\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.2 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3599.9, "1 h 00 min"),
        (7260, "2 h 01 min"),
    ],
)
def test_durations_are_written_as_people_write_them(seconds: float, text: str) -> None:
    assert messages.duration(seconds) == text
