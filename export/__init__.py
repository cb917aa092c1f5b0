"""A function of tensors in, a compiled artefact out."""
