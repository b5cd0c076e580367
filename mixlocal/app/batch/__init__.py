"""Many requests at once: a file of them in, a file of their answers out, on this machine or on others."""
