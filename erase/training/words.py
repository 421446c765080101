"""Words whose embeddings are learned so that they bring a concept back: during a training, and in attacks."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from erase.conditioning import Conditioning
from erase.data.latents import Data
from erase.data.prompt_states import with_word
from erase.device import staged
from erase.errors import EraseError
from erase.families.protocol import Family
from erase.methods.protocol import WordAttack
from erase.progress import progress
from erase.training.batches import Recipe, generator, sample

WORD = "~"  # one token in every CLIP vocabulary, and not used in prompts
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam


def token_of(model: Family) -> int:
    """The number of `WORD` in the model's vocabulary.

    Raises:
        EraseError: it has no single token there.
    """
    tokens = model.tokens(WORD)
    if len(tokens) != 1:
        raise EraseError(f"{model.name}'s tokenizer has no single token for {WORD!r}; it is not CLIP's")
    return tokens[0]


def spread_timesteps(num: int, num_timesteps: int, draw: torch.Generator) -> Tensor:
    """int64, [num], one at random from each of `num` equal parts of the range, rising.

    Independent timesteps are too noisy for a word that is learned in few steps.
    """
    strata = torch.arange(num) + torch.rand(num, generator=draw)
    return (strata * (num_timesteps / num)).long()


class Words:
    """Words that are attacked in turn during a training, so that they bring the concept back on the edited model.

    Nothing is drawn but from the recipe's seed and the step, so that `values` is all that a checkpoint has to hold.

    values: embeddings "word" and Adam's two moments "exp_avg" and "exp_avg_sq" of each, float32, [words, d].
    """

    def __init__(
        self,
        model: Family,
        attack: WordAttack,
        data: Data,
        recipe: Recipe,
        share: int,
        accelerator: Accelerator,
        *,
        quiet: bool = True,
    ):
        self._model, self._attack, self._data, self._recipe = model, attack, data, recipe
        self._share, self._accelerator, self._token = share, accelerator, token_of(model)
        self._every, self._quiet = attack.round_of(recipe.num_steps), quiet
        own = zip(data.forget.prompt.tolist(), data.anchor.tolist(), strict=True)
        self._texts = [with_word(data.prompts[prompt], data.prompts[anchor], WORD) for prompt, anchor in own]
        table, tokens = model.token_embeddings.detach(), _own_tokens(model, data)
        self._mean, self._own = table.mean(0).float(), table[tokens].float()
        first = torch.stack([self._start(word, 0) for word in range(attack.num_words)])
        self.values = {"word": first, "exp_avg": torch.zeros_like(first), "exp_avg_sq": torch.zeros_like(first)}

    @torch.no_grad()
    def said(self, rows: Tensor, step: int) -> list[Conditioning]:
        """The forget prompts of these forget images with the word that was attacked last before this step, or with each
        of the words found before it.

        rows: int64, on the CPU. Not differentiable; on the model's device.
        """
        done, num = step // self._every, self._attack.num_words
        words = [max(done - 1, 0) % num] if self._attack.every else range(min(done, num))
        texts = [self._texts[row] for row in rows.tolist()]
        return [self._model.encode_with(texts, self._token, self.values["word"][word].clone()) for word in words]

    def after(self, step: int, halt: Tensor | None) -> None:
        """Attack the model as it is after this step, if it is the turn; nothing changes if `halt` is not 0."""
        number, rest = divmod(step + 1, self._every)
        if rest or not self._attack.every and number > self._attack.num_words:
            return
        rounds, word = divmod(number - 1, self._attack.num_words)
        with progress(self._attack.num_steps, "word", "steps", quiet=self._quiet or self._attack.num_steps < 50) as bar:
            for taken in range(self._attack.num_steps):
                restarts, age = divmod(rounds * self._attack.num_steps + taken, self._attack.restart_after)
                if age == 0 and restarts:
                    self._put(word, halt, word=self._start(word, restarts), exp_avg=None, exp_avg_sq=None)
                self._step(word, age + 1, self._gradient(word, (step, taken)), halt)
                bar.update()

    def _start(self, word: int, restarts: int) -> Tensor:
        """The mean of all tokens for every other word, one of the forget prompts' own tokens for the rest."""
        if word % 2 == 0:
            return self._mean
        draw = generator(self._recipe.seed, "word", word, restarts)
        return self._own[int(torch.randint(len(self._own), (), generator=draw))]

    def _gradient(self, word: int, number: tuple[int, int]) -> Tensor:
        """Of the diffusion loss on images of the concept under prompts that say the word, [d].

        Each process takes its share of the images, in parts as the training has them.
        """
        images, num = self._data.forget, self._attack.batch_size
        draw = generator(self._recipe.seed, "words", *number)
        rows = torch.randint(len(images), (num,), generator=draw)
        x, t = sample(images, rows, draw), spread_timesteps(num, self._model.num_timesteps, draw)
        eps = torch.randn(x.shape, generator=draw)
        vector = self.values["word"][word].clone().requires_grad_(True)
        total = torch.zeros_like(vector)
        first, end = (
            (self._accelerator.process_index + one) * num // self._accelerator.num_processes for one in (0, 1)
        )
        for start in range(first, end, self._share):
            part = slice(start, min(start + self._share, end))
            x_0, t_0, eps_0 = (staged(whole[part], self._model.device) for whole in (x, t, eps))
            texts = [self._texts[row] for row in rows[part].tolist()]
            with torch.enable_grad():
                c = self._model.encode_with(texts, self._token, vector)
                with self._accelerator.autocast():
                    predicted = self._model(self._model.add_noise(x_0, eps_0, t_0), t_0, c)
                    loss = F.mse_loss(predicted, eps_0) * (len(x_0) / num)
                total += torch.autograd.grad(loss, [vector])[0]
        if self._accelerator.num_processes > 1:
            total = self._accelerator.reduce(total, reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def _step(self, word: int, number: int, gradient: Tensor, halt: Tensor | None) -> None:
        """Step `number`, from 1, of Adam (Kingma & Ba, 2015)."""
        now, m, v = (self.values[name][word] for name in ("word", "exp_avg", "exp_avg_sq"))
        moved, m, v = adam_step(now, m, v, gradient, number, self._attack.learning_rate)
        self._put(word, halt, word=moved, exp_avg=m, exp_avg_sq=v)

    def _put(self, row: int, halt: Tensor | None, **values: Tensor | None) -> None:
        """Set values of a word; None is zeros."""
        for name, value in values.items():
            now = self.values[name][row]
            value = torch.zeros_like(now) if value is None else value
            self.values[name][row] = value if halt is None else torch.where(halt == 0, value, now)


def adam_step(
    value: Tensor, m: Tensor, v: Tensor, gradient: Tensor, number: int, learning_rate: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and moments after step `number`, from 1, of Adam."""
    m = BETAS[0] * m + (1 - BETAS[0]) * gradient
    v = BETAS[1] * v + (1 - BETAS[1]) * gradient.square()
    root = (v / (1 - BETAS[1] ** number)).sqrt() + EPS
    return value - learning_rate / (1 - BETAS[0] ** number) * m / root, m, v


def _own_tokens(model: Family, data: Data) -> list[int]:
    """Numbers of the tokens that forget prompts have and their anchors lack, each once; `WORD`'s if there are none."""
    found: dict[int, None] = {}
    for row, own in dict(zip(data.forget.prompt.tolist(), data.words.tolist(), strict=True)).items():
        tokens = model.tokens(data.prompts[row])
        found |= {token: None for token, is_own in zip(tokens, own[1:], strict=False) if is_own}
    return [*found] or [token_of(model)]
