"""From a model of the Hub to a finished store: survey what is there, tell what it takes, land it, quantize it."""
