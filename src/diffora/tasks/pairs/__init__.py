"""Pairs of a source and a target text: reading, checks, encoding, batches, and the metrics of generated text."""
