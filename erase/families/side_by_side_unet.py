"""A UNet whose residual blocks see a time embedding and, beside it, a class embedding with an MLP of its own.

`UNet2DModel` of diffusers adds the two. Selective Amnesia, SalUn and SFRon concatenate them in the UNet of DDIM's code.
Folders of this package name this module in model_index.json, so diffusers opens them where the package is installed.
"""

from functools import wraps
from typing import Any

from diffusers import ModelMixin as ModelMixin  # diffusers looks for it beside the class that it loads
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn
from torch.nn import functional as F


class _TimeEmbedding(TimestepEmbedding):
    """[n, d] -> [n, 2 w]: the embedding in the first half and zeros in the second."""

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        embedding = super().forward(sample, condition)
        return F.pad(embedding, (0, embedding.shape[1]))


class _ClassEmbedding(nn.Embedding):
    """Labels [n] -> [n, 2 w]: zeros in the first half and an MLP of the label's row in the second."""

    def __init__(self, num_classes: int, width: int, hidden: int):
        super().__init__(num_classes, width)
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, input: Tensor) -> Tensor:
        embedding = self.linear_2(F.silu(self.linear_1(super().forward(input))))
        return F.pad(embedding, (embedding.shape[1], 0))


class SideBySideUNet2DModel(UNet2DModel):
    """e_t + e_c with e_t = [MLP(t), 0] and e_c = [0, MLP(row of c)], which is the concatenation, to the bit.

    Options are those of `UNet2DModel`. time_embedding_dim: the width of both embeddings together. num_class_embeds: the
    classes and a null class, whose label is the last.
    """

    @wraps(UNet2DModel.__init__)  # diffusers reads the names of the options from it
    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        config: Any = self.config
        width = config["block_out_channels"][0]
        half = (config["time_embedding_dim"] or 4 * width) // 2
        self.time_embedding: Any = _TimeEmbedding(width, half)
        self.class_embedding: Any = _ClassEmbedding(config["num_class_embeds"], width, half)
