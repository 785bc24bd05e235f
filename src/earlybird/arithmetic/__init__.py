"""Which operation? Shifts and additions where a network multiplies."""
