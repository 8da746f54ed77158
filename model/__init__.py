"""Architecture, optimiser, generation and conversion to the published formats."""
