"""Evaluation: answers of a served model graded by exact match, final number, unit tests or AST."""
