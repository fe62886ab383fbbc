"""Messages: plain lines on a terminal, which a program can silence or redirect."""

from __future__ import annotations

import logging

import pytest

from loraq.utils.console import LOGGER, duration, show_messages


@pytest.fixture(autouse=True)
def fresh_logger(monkeypatch):
    monkeypatch.setattr(LOGGER, "handlers", [])
    # Hydra's entry point, tested in the same process, leaves a handler with a closed stream
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    level, propagate = LOGGER.level, LOGGER.propagate
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True  # or pytest adds its own handler, after a run in this process
    yield
    LOGGER.setLevel(level)
    LOGGER.propagate = propagate


def test_messages_are_plain_lines_on_stderr_once(capsys):
    show_messages()
    show_messages()
    log = logging.getLogger("loraq.runner.experiment")
    log.info("[1/2] RTN")
    log.warning("a lock is held")
    log.debug("not shown")
    assert capsys.readouterr().err == "[1/2] RTN\nloraq: a lock is held\n"


def test_a_program_can_silence_messages(capsys):
    LOGGER.setLevel(logging.ERROR)
    show_messages()
    logging.getLogger("loraq.x").warning("silent")
    assert capsys.readouterr().err == ""


def test_a_program_can_redirect_messages(capsys):
    kept = []

    class Keep(logging.Handler):
        def emit(self, record):
            kept.append(record.getMessage())

    LOGGER.addHandler(Keep(logging.INFO))
    LOGGER.setLevel(logging.INFO)
    show_messages()
    logging.getLogger("loraq.x").info("kept")
    assert kept == ["kept"] and capsys.readouterr().err == ""


def test_durations_read_as_people_say_them():
    assert [duration(s) for s in (5, 200, 3900)] == ["0 min 05 s", "3 min 20 s", "1 h 05 min"]
