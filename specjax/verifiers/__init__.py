"""Refinement mechanisms: one file per rule for keeping what the target itself would have written."""
