"""Configuration and model of the compressed checkpoint; the two files travel with it."""
