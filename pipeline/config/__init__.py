"""Dials: what can be set, in which range, and how YAML and command line become a stage's config.

    errors -> dials (one dial, and the groups that stages share) -> stages, commands -> parse

Imports no deep-learning library, so `--help` answers at once.
"""
