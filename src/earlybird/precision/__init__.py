"""With how many bits? Operands of convolutions and linear layers are quantised in training; the weights stay float32."""
