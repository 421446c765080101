"""Model families: everything that is specific to an architecture of diffusion models."""
