"""Evaluation of tokenizers: metrics, the evaluator, reports and pictures."""
