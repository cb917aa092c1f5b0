"""What counterlens is measured against."""
