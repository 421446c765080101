"""All knowledge of diffusion model architectures."""
