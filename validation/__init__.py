"""Every stage against the reference model, and the report. May import every step."""
