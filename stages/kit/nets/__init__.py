"""Encoders' parts: patches, positions, masks, decoders, averages of weights."""

from stages.kit import eager

with eager.without_tracer():
    import timm  # noqa: F401  first here, so that no later import of it loads torch's tracer
