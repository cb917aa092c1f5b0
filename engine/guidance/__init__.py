"""Guided denoising: the pullback, the schedule, the guided step and the sampler."""
