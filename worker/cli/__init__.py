"""One module for each command. Each imports what it needs when it is called, so that all start fast."""
