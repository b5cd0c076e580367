"""What a quantized tensor is: formats, packing, the quantizers themselves."""
