"""What running sparse costs and gains: quality and time of a model, dense and sparse side by side."""
