"""Judges of text, figures with intervals, and the page that people read."""
