"""Adapter arithmetic: expressions, their exact value, the files, the proof, the search for weights."""
