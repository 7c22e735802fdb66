"""Import and export of models in published layouts: `scmdm import` and `scmdm export`."""
