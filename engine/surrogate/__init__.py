"""A differentiable student of a black box: trained on its answers, asked for gradients, never for the verdict."""
