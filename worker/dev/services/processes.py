"""``onenet-worker`` commands as processes: started, observed and stopped by process id."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from worker.dev.services.ports import is_listening, wait_until
from worker.errors import LocalServiceError
from worker.settings import Settings

_STOP_S = 90
_NO_PROXY = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}  # a proxy of the environment cannot reach this machine
_SETTINGS = {name.upper().removesuffix("_FILE") for name in Settings.model_fields}


class LocalProcess:
    """One ``onenet-worker`` command with its output in a file; it gets no settings but the given ones.

    Args:
        arguments: of ``onenet-worker``.
        environment: its settings; it does not inherit the settings of this process, nor read its ``.env``.
        output: file for stdout and stderr.
        python: interpreter in whose environment the worker is installed.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path,
        python: Path | str = sys.executable,
    ) -> None:
        self.output = output
        inherited = {
            name: value
            for name in os.environ
            if name.removesuffix("_FILE") not in _SETTINGS
            and (value := os.environ.get(name)) is not None  # another thread may take a variable away meanwhile
        }
        with output.open("ab") as stream:
            self._process = subprocess.Popen(
                [str(python), "-m", "worker", *arguments],
                env={**inherited, **_NO_PROXY, **environment},
                cwd=output.parent,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # ctrl-C is for this process, which then stops the command
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
        """Wait for the end of the process and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Stop the process with SIGTERM, or kill it if it does not stop."""
        if self.is_running:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.kill()

    def wait_for_port(self, port: int, timeout_s: float = 90) -> None:
        """Wait until it listens on a port.

        Raises:
            LocalServiceError: it ended, or did not listen in time.
        """
        self._wait_for(lambda: is_listening("127.0.0.1", port), timeout_s, f"port {port}")

    def wait_for_output(self, text: str, timeout_s: float = 90) -> None:
        """Wait until a text is in its output.

        Raises:
            LocalServiceError: it ended, or the text did not come in time.
        """
        self._wait_for(lambda: text in self.output.read_text(errors="replace"), timeout_s, text)

    def _wait_for(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        def is_ready() -> bool:
            if not self.is_running:
                output_end = self.output.read_text(errors="replace")[-1000:].splitlines()
                raise LocalServiceError("the process ended:", *output_end)
            return condition()

        try:
            wait_until(is_ready, timeout_s, what)
        except TimeoutError as exc:
            raise LocalServiceError(str(exc)) from exc
