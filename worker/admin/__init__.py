"""What operators ask for and do, as services with plain results: the command line shows them, and a page can."""
