"""Tunery: a fine-tuning service for your own GPUs. The package that its programs share."""

__version__ = "0.1.0"
