"""onenet-execute-worker: from RabbitMQ to OneNET's cached Execute commands, none lost, none sent twice."""

from importlib.metadata import version

__version__ = version("onenet-execute-worker")
