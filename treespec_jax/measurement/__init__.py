"""How things are timed and shown; knows nothing of commands, flags or settings."""
