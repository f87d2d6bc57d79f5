"""Preference alignment of diffusion models, from scratch: PrefPaint and RPO."""

__version__ = "0.2.0"
