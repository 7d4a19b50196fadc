"""Encoders' parts: patches, positions, masks, decoders, averages of weights."""
