"""Signals that end a program which has started servers."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from worker.dev.services.signals import ended_by_signals, ignore_signals, signals_held_back


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, pytest.raises(KeyboardInterrupt)),
        (signal.SIGTERM, pytest.raises(SystemExit, match="143")),
        (signal.SIGHUP, pytest.raises(SystemExit, match="129")),
    ],
)
def test_a_signal_is_held_back_until_what_was_started_is_known(
    number: signal.Signals, error: "pytest.RaisesExc[BaseException]"
) -> None:
    known = False
    with error, ended_by_signals(), signals_held_back():
        signal.raise_signal(number)
        known = True
    assert known


def test_a_signal_that_came_while_something_could_not_be_started_ends_the_program() -> None:
    def start() -> None:
        with ended_by_signals(), signals_held_back():
            signal.raise_signal(signal.SIGTERM)
            raise OSError("cannot be started")

    with pytest.raises(SystemExit) as caught:
        start()
    assert isinstance(caught.value.__context__, OSError)


def test_servers_are_started_in_other_threads_as_well() -> None:
    with ThreadPoolExecutor(1) as pool, ended_by_signals():
        assert pool.submit(_is_started).result()


def test_more_signals_do_not_keep_the_servers_from_being_stopped() -> None:
    stopped: list[str] = []

    def run() -> None:
        with ended_by_signals():
            try:
                signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
                for number in numbers:
                    signal.raise_signal(number)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # at once, as from a closed terminal
            finally:
                signal.raise_signal(signal.SIGINT)
                stopped.append("servers")

    numbers = [signal.SIGTERM, signal.SIGHUP]
    with pytest.raises(SystemExit):
        run()
    assert stopped == ["servers"]


def test_signals_do_as_before_once_the_servers_are_stopped() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with ended_by_signals():
        ignore_signals()
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def _is_started() -> bool:
    with signals_held_back():
        return True
