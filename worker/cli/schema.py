"""``onenet-worker schema``."""

import json
from enum import StrEnum
from typing import Annotated

import typer


class Document(StrEnum):
    """What can be printed."""

    COMMAND = "command"
    REPLY = "reply"


def schema(document: Annotated[Document, typer.Argument(help="Which message.")]) -> None:
    """Print the JSON Schema (2020-12) of a message.

    Example:

        onenet-worker schema command > command.schema.json
    """
    from pydantic import TypeAdapter  # noqa: PLC0415
    from pydantic.json_schema import GenerateJsonSchema  # noqa: PLC0415

    from schemas.command import COMMAND  # noqa: PLC0415
    from schemas.reply import Reply  # noqa: PLC0415

    adapter: TypeAdapter[object] = COMMAND if document is Document.COMMAND else TypeAdapter(Reply)  # type: ignore[assignment]
    mode = "validation" if document is Document.COMMAND else "serialization"  # in a reply every field is there
    found = {"$schema": GenerateJsonSchema.schema_dialect, **adapter.json_schema(mode=mode)}  # type: ignore[arg-type]
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
