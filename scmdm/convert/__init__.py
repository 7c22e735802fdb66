"""Models as other people publish them: `scmdm import` and `scmdm export`."""
