"""Which weights, changing all the time? Single weights that are zero, how to hold them there, and what that costs."""
