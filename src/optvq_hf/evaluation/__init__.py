"""How good a tokenizer is: metrics, the evaluator, and pictures."""
