"""One file a command: which step function runs with which options. May import every room; only cli.py imports this one."""
