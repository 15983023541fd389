"""What only development needs: simulator, demo and shell completion. The image for production has none of them."""

from importlib.util import find_spec

from worker.errors import WorkerError

IS_INSTALLED = find_spec("worker.dev") is not None


def not_installed(command: str) -> WorkerError:
    """Return the error that says how to get what a command needs."""
    if IS_INSTALLED:
        return WorkerError(f"{command} needs an extra: pip install 'onenet-execute-worker[simulator]'")
    return WorkerError(
        f"{command} is not in the image for production: build the image that has it by docker build --target simulator"
    )
