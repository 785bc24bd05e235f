"""From where do we start? Encoders that are trained without labels."""
