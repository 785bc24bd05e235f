"""Which samples, pixels, tokens and layers? What need not be computed is left out, not multiplied by zero."""
