"""What the optimizer keeps: the first moment in its formats, the second moments, stochastic rounding."""
