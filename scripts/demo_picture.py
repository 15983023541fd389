"""Draws docs/demo.svg, the picture in the README, from a real run of the demo: ``python -m scripts.demo_picture``."""

import io
import re
import sys

from rich.console import Console

from scripts.documents import ROOT
from worker.dev.demo import run_demo

PICTURE = ROOT / "docs" / "demo.svg"
_COLUMNS = 100
_COMMANDS = 400
# Each run has other names and numbers; so that a new picture differs only where the demo does, they are replaced.
_OF_ONE_RUN = (
    (re.compile(r"onenet-demo-[0-9a-f]{6}"), "onenet-demo-4f5e01"),
    (re.compile(r"(?<=process&#160;)[0-9]+"), "4711"),
    (re.compile(r"(?<=127\.0\.0\.1:)[0-9]+"), "8580"),
)
_COMMENT = re.compile(r"<!--.*?-->\s*")
_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # they would be loaded from elsewhere


def main() -> None:
    """Run the demo, print what it shows, and write the picture."""
    shown = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=False)
    if not run_demo(shown, _COMMANDS, keep=False):
        sys.exit("the demo has failed:\n" + shown.export_text())
    picture = shown.export_svg(title="make demo", unique_id="demo")
    for pattern, text in _OF_ONE_RUN:
        picture = pattern.sub(text, picture)
    PICTURE.write_text(_COMMENT.sub("", _FONTS.sub("", picture)))


if __name__ == "__main__":
    main()
