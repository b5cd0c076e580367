"""Where experts live and how they reach a processor."""
