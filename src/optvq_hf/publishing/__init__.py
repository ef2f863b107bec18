"""Bringing models in from the original implementation, and describing them."""
