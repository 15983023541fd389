"""``onenet-worker schema``."""

import json
from enum import StrEnum
from typing import Annotated

import typer

from worker.cli.terminal import print_line


class Document(StrEnum):
    """The documents that can be printed."""

    COMMAND = "command"
    REPLY = "reply"
    RESULT = "result"
    ASYNCAPI = "asyncapi"


def schema(document: Annotated[Document, typer.Argument(help="The document to print.")]) -> None:
    """Print the JSON Schema (2020-12) of a message, or the AsyncAPI (3.0) document of all messages.

    For example:

        onenet-worker schema command > command.schema.json
    """
    from worker.cli import contracts

    made = {
        Document.COMMAND: contracts.command_schema,
        Document.REPLY: contracts.reply_schema,
        Document.RESULT: contracts.result_schema,
        Document.ASYNCAPI: contracts.asyncapi,
    }[document]()
    print_line(json.dumps(made, indent=2, ensure_ascii=False))
