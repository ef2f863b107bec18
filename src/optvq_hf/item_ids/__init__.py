"""Item ids: embeddings of any items to a short sequence of codes for each, by residual quantization."""
