"""The embedded pixel model: a small class-conditional diffusion model of the world's shapes, without VAE and text.

`drawings` makes its data; `judge` recognises what an image shows; `train` makes the weights
(`python -m erase.mini train --model mini-pixel`), which ship in weights/.
"""
