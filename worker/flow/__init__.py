"""Flow control: consuming and prefetch, one command at a time per device, and the rate limit."""
