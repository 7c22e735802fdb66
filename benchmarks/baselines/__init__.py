"""What published code for masked diffusion does, written plainly, to be compared with on the same weights and data."""
