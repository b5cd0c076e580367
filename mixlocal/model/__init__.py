"""The mathematics: token ids and a KV cache in, logits out."""
