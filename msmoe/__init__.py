"""msmoe."""
