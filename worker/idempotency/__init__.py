"""What is remembered of commands: in one process, or in Redis for a fleet."""
