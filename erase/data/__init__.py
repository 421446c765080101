"""Images, prompts and latents: what a run trains on."""
