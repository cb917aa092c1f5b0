"""Explanations as a service: one worker that owns the models, and HTTP in front of it."""
