"""Saliency: the LAX adapter, established methods beside it, and what they explain."""
