"""Training of OptVQ with Accelerate."""
