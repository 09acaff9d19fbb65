"""Training, testing and predicting with the three frameworks: what the tools are made of."""
