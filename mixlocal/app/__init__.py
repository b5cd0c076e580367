"""Use cases in the user's words. Text lives here and never below."""
