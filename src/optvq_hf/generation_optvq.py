"""Generation of images with a language model: which token ids may come next."""

import torch
from transformers import LogitsProcessor

from .configuration_optvq import OptVQConfig


class OptVQLogitsProcessor(LogitsProcessor):
    """Keeps `generate()` of a language model to ids that [`OptVQModel.from_token_ids`] decodes.

    At every position of the image, only ids of the head and level whose turn it is are left; after the last one only
    `eos_token_id`. Other ids of the vocabulary (text, class labels, begin of sequence) stay with the caller: image ids start at
    `first_token_id`.

    Args:
        config: Of the tokenizer; gives the number of heads, levels and codes and, without `grid`, the size of the image.
        first_token_id: First id of the image tokens in the vocabulary, as in [`OptVQModel.to_token_ids`].
        prompt_length: Ids before the image, with padding: length of the `input_ids` that `generate()` is given; 0 for
            `inputs_embeds`.
        grid: Height and width in tokens; by default those of a `config.image_size` x `config.image_size` image.
        eos_token_id: The only id after the image; without it, generation must end there. No id of images may be among the
            `eos_token_id` of the model's generation config, which ends sequences: for Llama that is 2, if not set.

    Attributes:
        num_ids: Ids of one image: `max_new_tokens` of `generate()`, plus 1 with an `eos_token_id`.

    Raises:
        ValueError: For numbers that cannot be meant; when called, for a vocabulary too small for the ids, a sequence shorter
            than the prompt, or one beyond the image without `eos_token_id`.

    Example:

    ```python
    processor = OptVQLogitsProcessor(tokenizer.config, first_token_id=11, prompt_length=1)
    ids = language_model.generate(labels[:, None], logits_processor=[processor], max_new_tokens=processor.num_ids)
    images = tokenizer.decode(codes=tokenizer.from_token_ids(ids[:, 1:], first_token_id=11)).reconstruction
    ```
    """

    def __init__(
        self,
        config: OptVQConfig,
        first_token_id: int = 0,
        *,
        prompt_length: int,
        grid: tuple[int, int] | None = None,
        eos_token_id: int | None = None,
    ):
        if not isinstance(eos_token_id, int | None):  # transformers also has lists of them
            raise ValueError(f"eos_token_id must be one id, which ends the image, got {eos_token_id}")
        height, width = (config.latent_size, config.latent_size) if grid is None else grid
        numbers = {"first_token_id": first_token_id, "prompt_length": prompt_length, "eos_token_id": eos_token_id or 0}
        for name, number in numbers.items():
            if number < 0:
                raise ValueError(f"{name} must be 0 or greater, got {number}")
        if min(height, width) < 1:
            raise ValueError(f"grid must be height and width in tokens, got {grid}")
        if eos_token_id is not None and 0 <= eos_token_id - first_token_id < config.vocab_size:
            raise ValueError(
                f"eos_token_id is {eos_token_id}, but ids {first_token_id} to {first_token_id + config.vocab_size - 1} are of "
                "images: generation would end amid an image"
            )
        self.codes_per_token, self.codebook_size = config.codes_per_token, config.codebook_size
        self.first_token_id, self.prompt_length, self.eos_token_id = first_token_id, prompt_length, eos_token_id
        self.num_ids = height * width * self.codes_per_token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (B, vocabulary) with -inf for all other ids, from ids so far (B, length) and scores."""
        first, last = self._allowed(input_ids.shape[1] - self.prompt_length)
        if last >= scores.shape[-1]:
            raise ValueError(
                f"the language model has a vocabulary of {scores.shape[-1]} ids, but image ids go up to "
                f"{max(last, self.first_token_id + self.codes_per_token * self.codebook_size - 1)}"
            )
        kept = torch.full_like(scores, float("-inf"))
        kept[:, first : last + 1] = scores[:, first : last + 1]
        return kept  # pyright: ignore[reportReturnType]

    def _allowed(self, position: int) -> tuple[int, int]:
        """First and last id that may stand at a position of the image."""
        if position < 0:
            raise ValueError(f"prompt_length is {self.prompt_length}, but generation starts {-position} ids earlier")
        if position < self.num_ids:
            first = self.first_token_id + position % self.codes_per_token * self.codebook_size
            return first, first + self.codebook_size - 1
        if self.eos_token_id is None:
            raise ValueError(
                f"the image is complete after {self.num_ids} ids: pass max_new_tokens={self.num_ids} to generate(), or an "
                "eos_token_id"
            )
        return self.eos_token_id, self.eos_token_id
