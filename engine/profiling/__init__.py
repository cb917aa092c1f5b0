"""Where time and memory of guided sampling go: `counterlens profile`, and `profile.profile` from Python."""
