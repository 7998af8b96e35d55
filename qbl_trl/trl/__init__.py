"""The trainer half: one callback that places adapters, watches them, merges, verifies and reports."""
