"""ReCARE (Kim et al., ICLR 2026): STEREO's rounds of words, then an erasure that keeps what occurs with the concept."""

from dataclasses import dataclass

import torch

from erase.conditioning import Conditioning
from erase.methods.inputs import Batch
from erase.methods.stereo import Stereo
from erase.methods.terms import Seen


@dataclass(frozen=True)
class ReCARE(Stereo):
    """The search is STEREO's (Srivatsan et al., CVPR 2025). Erasure, from theta*: down L_e + alpha L_r, where

        L_e = mean_c ||eps(x_t | c) - [e_0 + (s - 1)(e_a - e_0) - (s + 1) mean_j (e_j - e_0)]||^2
    over c_f and the words v_j themselves (STEREO: c_f alone), and
        L_r = ||eps(x_t | c_r) - eps*(x_t | c_r)||^2
    on the same noised images of the concept, under a retain prompt c_r, one at random for each image and step. Words
    that occur together with the concept ("person", "skin" for nudity) must keep their meaning where they occur with it.
    No retain images are generated. Here STEREO keeps retain prompts on their own images.

    The authors find such words with CLIP: the tokens nearest to images of the concept, in clusters, without the
    clusters that mean the concept itself or nothing; and their anchors are such words too. Here retain prompts and
    anchors are the concept's; give words that occur with it as --retain.

    Hyperparameters are STEREO's; the authors take 2 words and 200 steps for each part.

    Costs: those of STEREO, and in a step of the erasure one more forward and backward pass for each word.
    Known weakness: attacks that use no words, such as fine-tuning; prompts are retained on images of the concept only.
    """

    retain_images = False

    _name = "recare"

    words: int = 2

    def _erased(self, batch: Batch) -> tuple[Conditioning, ...]:
        return (batch.c_forget, *batch.c_words)

    def _kept(self, batch: Batch) -> Seen:
        rows = torch.arange(len(batch.c_retain), device=batch.x_forget.device) % len(batch.x_forget)
        return batch.x_forget[rows], batch.t_forget[rows], batch.c_retain
