"""Refinement mechanisms: one file per rule for keeping what the target would have written."""
