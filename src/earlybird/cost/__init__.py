"""What did it cost? Counted operations, modelled energy, measured memory and joules, and the bill that holds them."""
