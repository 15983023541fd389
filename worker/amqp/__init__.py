"""The broker edge: where the worker speaks with pika."""

from worker.amqp.tables import install

install()
