"""EngineCore: models held under one runtime, images and targets in, measured counterfactuals out."""
