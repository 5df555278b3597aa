"""What the covariance matrix of a kernel is, before it is evaluated and while it is."""
