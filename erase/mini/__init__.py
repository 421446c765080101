"""The embedded model: a genuine Stable Diffusion in miniature, trained from scratch on drawings."""
