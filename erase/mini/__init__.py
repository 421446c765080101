"""The embedded model: a small Stable Diffusion, trained from scratch on drawings, which ships in weights/.

`world` draws the data and writes the captions; `judge` recognises what an image shows; `quality` measures a model;
`train` makes the weights (`python -m erase.mini train`); `card` writes the model card.
"""
