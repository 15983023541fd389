"""The broker edge: the only importer of pika."""

from worker.amqp.tables import install

install()
