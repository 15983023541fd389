"""onenet-execute-worker: commands from RabbitMQ, cached for devices by OneNET, and the outcome of each."""

from importlib.metadata import version

__version__ = version("onenet-execute-worker")
