"""What a model's bits cost: perplexity, and divergence from a reference, in llama-perplexity's terms."""
