"""The theory of both papers as functions, for scripts and notebooks. Training does not use this room."""
