"""How a guided step is executed: in eager PyTorch, or as a compiled artefact that was checked against it."""
