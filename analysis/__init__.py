"""Figures and reports from stats, plans and results; `msmoe` does not need them."""
