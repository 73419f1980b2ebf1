"""One calibration, many methods, one table."""
