"""The settings, as every command but ``run`` and ``check`` reads them."""

from typing import TYPE_CHECKING

from worker.cli.terminal import note

if TYPE_CHECKING:
    from worker.settings import Settings


def read_settings() -> "Settings":
    """Read and check the settings; names that look like settings and are none are said on stderr.

    Raises:
        SettingsError: with one line per wrong setting.
    """
    from worker.settings import load_settings

    note_unknown_settings()  # first: a wrong setting may be the one that was meant
    return load_settings()


def note_unknown_settings() -> None:
    """Say on stderr which names look like settings and have no effect."""
    from worker.settings import find_unknown_settings

    for unknown in find_unknown_settings():
        note(str(unknown))
