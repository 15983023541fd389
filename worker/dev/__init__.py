"""What a developer needs and production does not: the demo, and private RabbitMQ and Redis servers."""
