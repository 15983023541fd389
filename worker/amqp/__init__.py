"""The broker edge: the only importer of pika."""
