"""Our own commands as processes: started, watched, stopped by their process id."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from worker.dev.services.ports import is_listening, wait_until
from worker.errors import LocalServiceError
from worker.settings import Settings

_STOP_S = 40
_NO_PROXY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # no proxy of the environment leads to this machine
_SETTINGS = {name.upper().removesuffix("_FILE") for name in Settings.model_fields}


class LocalProcess:
    """One ``onenet-worker`` command, its output in a file; of the settings it knows only those that are given.

    Args:
        arguments: behind ``onenet-worker``.
        environment: its settings; the settings of this process, and its ``.env``, are kept from it.
        output: where stdout and stderr go.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
        self.output = output
        inherited = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in _SETTINGS}
        with output.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "worker", *arguments],
                env={**inherited, **_NO_PROXY, **environment},
                cwd=output.parent,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a ctrl-C is meant for us, who stop it in good order
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = _STOP_S) -> int:
        """Wait for its end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it: in good order if it does, else at once."""
        if self.is_running:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.kill()

    def wait_for_port(self, port: int, timeout_s: float = 20) -> None:
        """Wait until it listens.

        Raises:
            LocalServiceError: it ended, or does not listen in time.
        """

        def is_ready() -> bool:
            if not self.is_running:
                raise LocalServiceError(f"it ended: {self.output.read_text(errors='replace')[-1000:]}")
            return is_listening("127.0.0.1", port)

        try:
            wait_until(is_ready, timeout_s, f"port {port}")
        except TimeoutError as exc:
            raise LocalServiceError(str(exc)) from exc
