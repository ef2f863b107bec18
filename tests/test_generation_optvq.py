"""What a language model may generate: sequences that decode, whatever its weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from builders import make_untrained, plain_config
from optvq_hf import OptVQLogitsProcessor


FIRST, EOS = 12, 10  # ids below FIRST are the language model's own
TOKENIZER = plain_config(image_size=16)  # 4 x 4 tokens of 2 heads with 128 codes


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": EOS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=FIRST + TOKENIZER.vocab_size, **ids, **sizes)).eval()


def generate(language_model, processor, prompt, **options):
    torch.manual_seed(0)
    return language_model.generate(torch.tensor(prompt), logits_processor=[processor], **options)


def test_the_vocabulary_has_the_ids_of_all_heads():
    codes = torch.full((1, 2, 4, 4), 127)
    assert int(make_untrained(TOKENIZER).to_token_ids(codes).max()) == TOKENIZER.vocab_size - 1 == 255


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 3.0},
        {"do_sample": True, "top_k": 5, "guidance_scale": 2.0},
        {"num_beams": 2},
        {"do_sample": True, "top_p": 0.5, "use_cache": False},
    ],
    ids=str,
)
def test_every_generated_sequence_decodes(language_model, options):
    """Although the language model has never been trained, and mostly prefers ids of other heads or of no image."""
    processor = OptVQLogitsProcessor(TOKENIZER, FIRST, prompt_length=2)
    ids = generate(language_model, processor, [[0, 3], [0, 4]], max_new_tokens=processor.num_ids, **options)
    codes = make_untrained(TOKENIZER).from_token_ids(ids[:, 2:], FIRST)
    assert codes.shape == (2, 2, 4, 4)
    without = language_model.generate(torch.tensor([[0, 3]]), max_new_tokens=processor.num_ids, do_sample=True)
    with pytest.raises(ValueError, match="token_ids"):
        make_untrained(TOKENIZER).from_token_ids(without[:, 2:], FIRST)


def test_after_the_image_only_the_end(language_model):
    processor = OptVQLogitsProcessor(TOKENIZER, FIRST, prompt_length=1, grid=(2, 3), eos_token_id=EOS)
    ids = generate(language_model, processor, [[0], [1]], max_new_tokens=50, do_sample=True)
    assert ids.shape == (2, 1 + 2 * 3 * 2 + 1) and (ids[:, -1] == EOS).all()
    make_untrained(TOKENIZER).from_token_ids(ids[:, 1:-1], FIRST, grid=(2, 3))
    without_end = OptVQLogitsProcessor(TOKENIZER, FIRST, prompt_length=1, grid=(2, 3))
    with pytest.raises(ValueError, match=r"complete after 12 ids: pass max_new_tokens=12"):
        generate(language_model, without_end, [[0]], max_new_tokens=50)


def test_scores_of_allowed_ids_are_kept():
    scores = torch.randn(3, FIRST + 256)
    processor = OptVQLogitsProcessor(TOKENIZER, FIRST, prompt_length=4)
    for position, first in ((0, FIRST), (1, FIRST + 128), (2, FIRST), (31, FIRST + 128)):
        kept = processor(torch.zeros(3, 4 + position, dtype=torch.long), scores)
        assert torch.equal(kept[:, first : first + 128], scores[:, first : first + 128])
        assert kept.isfinite().sum() == 3 * 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_token_id": -1, "prompt_length": 0}, "first_token_id must be 0 or greater, got -1"),
        ({"prompt_length": -2}, "prompt_length must be 0 or greater, got -2"),
        (
            {"prompt_length": 0, "first_token_id": 5, "eos_token_id": 260},
            "eos_token_id is 260, but ids 5 to 260 are of images",
        ),
        ({"prompt_length": 0, "grid": (0, 3)}, r"grid must be height and width in tokens, got \(0, 3\)"),
        (
            {"prompt_length": 0, "eos_token_id": [1, 2]},
            r"eos_token_id must be one id, which ends the image, got \[1, 2\]",
        ),
        ({"prompt_length": 2}, "prompt_length is 2, but generation starts 1 ids earlier"),
        ({"first_token_id": 100, "prompt_length": 1}, "a vocabulary of 200 ids, but image ids go up to 355"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptVQLogitsProcessor(TOKENIZER, **settings)(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 200))
