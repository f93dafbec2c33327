"""Pairs of a source and a target text: reading and checking them, encoding, batches, and the metrics of generated text."""
