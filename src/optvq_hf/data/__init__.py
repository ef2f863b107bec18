"""Reads datasets of images into batches of pixel values."""
