"""Dials: what can be set, in which range, and how YAML and command line become a stage's config.

    errors, names, dials (what stages share) -> stages, commands -> values -> help -> parse

Imports no deep-learning library, so `--help` answers at once.
"""
