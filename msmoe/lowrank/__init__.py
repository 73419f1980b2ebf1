"""Low rank plus row-sparse form of expert matrices: decompose, choose a shape, truncate. Pure tensors."""
