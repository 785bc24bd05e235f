"""How many steps? Optimizers that need fewer of them."""
