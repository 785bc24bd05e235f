"""With how many bits? Operands of layers are quantised in training; their weights stay float32."""
