"""One module for each command. What a command needs is imported when it is called, so that each starts fast."""
