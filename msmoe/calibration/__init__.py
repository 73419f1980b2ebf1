"""Calibration: records -> batches -> hooks -> stats."""
