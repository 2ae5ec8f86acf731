"""Initialisation by pseudo-labels and marginal-likelihood training."""
