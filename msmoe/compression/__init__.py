"""Carry out a plan: checkpoint + plan -> compressed checkpoint, and what it cost."""
