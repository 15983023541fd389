"""The messages as pydantic models without behaviour: command, reply, headers, and the platform's answers."""
