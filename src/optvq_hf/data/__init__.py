"""From `datasets` to batches of pixel values."""
