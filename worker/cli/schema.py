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
    from pydantic.json_schema import GenerateJsonSchema

    from schemas.command import COMMAND
    from schemas.reply import Reply

    reply = Reply.model_json_schema(mode="serialization")  # every field is there, if only with null
    found = COMMAND.json_schema() if document is Document.COMMAND else reply
    typer.echo(json.dumps({"$schema": GenerateJsonSchema.schema_dialect, **found}, indent=2, ensure_ascii=False))
