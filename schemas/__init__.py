"""What travels, as pydantic models without behaviour: the command, the reply and the platform's answer."""
