"""What is decided: pure, no I/O, no threads, no clock."""
