"""Take a concept out of a Stable Diffusion model, and show that it is gone and that the rest is still there."""
