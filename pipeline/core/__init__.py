"""The mathematics, as functions of tensors: masks and log-probabilities, losses, advantages.

Imports torch and nothing else.
"""
