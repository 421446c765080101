"""Training data: images, prompts and latents."""
