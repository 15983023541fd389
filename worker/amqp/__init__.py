"""The broker edge: where the worker speaks with pika."""

from worker.amqp.field_table import install

install()
