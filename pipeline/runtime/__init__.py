"""A stage as a process: its folder and log, its checkpoints, its launch, precision, console and tracker.

Knows nothing of language models or text.
"""
