"""Usage errors in words of our own: Typer passes on those of the library that converts the values of options."""

import re
import shlex
from typing import Any

from typer.core import TyperGroup


class Program(TyperGroup):
    """The program with its commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except Exception as exc:
            _reword(exc)
            raise


_EXTRA = re.compile(r"Got unexpected extra argument\(s\) \((.*)\)", re.DOTALL)
_MEANT = ("--id", "--imei", "--product", "--file")  # what people give without the name of an option


def _reword(error: Any) -> None:
    """Change the text of a usage error that was made of an error of validation, or of a value without its option."""
    if found := _EXTRA.fullmatch(getattr(error, "message", "")):
        options = {name for parameter in error.ctx.command.params for name in parameter.opts}
        meant = next((name for name in _MEANT if name in options), None)
        hint = "" if meant is None else f": did you mean {meant} {shlex.quote(found[1])}?"
        error.message = f"there is no argument {found[1]}{hint}"
        return
    from pydantic import ValidationError

    from worker.core.validation import messages, shown

    cause = error.__cause__
    if not (isinstance(cause, ValidationError) and hasattr(error, "message")):
        return
    [text] = list(messages(cause).values())[:1]
    given = str(cause.errors(include_url=False)[0]["input"])
    error.message = text if text.startswith(f"{given!r} is not") else f"{text}, not {shown(given)}"
