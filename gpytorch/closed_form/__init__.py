"""The covariance matrix of a kernel as an expression: written down, evaluated, and differentiated."""
