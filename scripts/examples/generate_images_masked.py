"""Train a BERT to fill in masked tokens of images, and make new images in a few steps, as MaskGIT (arXiv 2202.04200).

    python scripts/examples/generate_images_masked.py --evaluate

Takes tokenizer and tokens that generate_images.py has made, or makes them, and resumes as that does. Ids of the BERT: the
classes, "no class", "masked", then those of the tokenizer.
"""

import math

import torch
from accelerate import PartialState
from token_training import Tokens, drop_classes, make_parser, read_tokens, show, train
from transformers import BertConfig, BertForMaskedLM


def make_model(tokens: Tokens, hidden_size: int, num_layers: int) -> BertForMaskedLM:
    config = BertConfig(
        vocab_size=tokens.num_classes + 2 + tokens.tokenizer.config.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=1 + tokens.ids.shape[1],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return BertForMaskedLM(config)


def code_logits(model: BertForMaskedLM, tokens: Tokens, ids: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Logits (B, length, codebook_size): at every position only those of the codes of its head."""
    logits = model(input_ids=torch.cat([classes[:, None], ids], dim=1)).logits[:, 1:, tokens.num_classes + 2 :]
    config = tokens.tokenizer.config
    channels = torch.arange(ids.shape[1], device=ids.device) % config.codes_per_token
    of_channels = logits.unflatten(2, (config.codes_per_token, config.codebook_size))
    return of_channels[:, torch.arange(ids.shape[1], device=ids.device), channels]


def guided(with_class: torch.Tensor, without: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance: u + scale * (c - u)."""
    return without + scale * (with_class - without)


@torch.inference_mode()
def generate(
    model: BertForMaskedLM,
    tokens: Tokens,
    labels: torch.Tensor,
    num_steps: int = 12,
    temperature: float = 1.0,
    choice_temperature: float = 4.5,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """Draws ids (B, length) in [0, tokenizer.config.vocab_size) of classes (B,).

    Every step draws all masked ids and keeps those it is most confident of; cos(pi/2 * step / num_steps) stay masked.
    """
    no_class, masked, first_token_id = tokens.num_classes, tokens.num_classes + 1, tokens.num_classes + 2
    labels, length, config = labels.to(model.device), tokens.ids.shape[1], tokens.tokenizer.config
    first_ids = first_token_id + torch.arange(length) % config.codes_per_token * config.codebook_size
    ids = torch.full((len(labels), length), masked, device=model.device)
    for step in range(1, num_steps + 1):
        with_class = code_logits(model, tokens, ids, labels)
        without = code_logits(model, tokens, ids, torch.full_like(labels, no_class))
        codes = torch.distributions.Categorical(logits=guided(with_class, without, guidance_scale) / temperature)
        drawn = codes.sample()
        noise = -torch.empty(drawn.shape, device=model.device).exponential_().log()  # Gumbel
        confidence = codes.log_prob(drawn) + choice_temperature * (1 - step / num_steps) * noise
        confidence = confidence.masked_fill(ids != masked, math.inf)
        ids = torch.where(ids == masked, drawn + first_ids.to(model.device), ids)
        num_masked = math.floor(length * math.cos(math.pi / 2 * step / num_steps))
        ids.scatter_(1, confidence.topk(num_masked, largest=False).indices, masked)
    return ids - first_token_id


def main(argv=None) -> dict:
    parser = make_parser(__doc__.splitlines()[0])
    parser.set_defaults(max_steps=1500)  # it learns nothing from the third of the ids that is not masked
    parser.add_argument("--num-steps", default=12, type=int, help="Steps of generation")
    parser.add_argument("--choice-temperature", default=4.5, type=float, help="Randomness of what stays masked")
    arguments = parser.parse_args(argv)
    folder = arguments.output_dir / "masked"
    tokens = read_tokens(arguments)
    no_class, masked, first_token_id = tokens.num_classes, tokens.num_classes + 1, tokens.num_classes + 2

    def loss_of(model, ids, labels):
        classes, ids = drop_classes(labels, no_class, arguments.class_dropout), first_token_id + ids
        share = torch.cos(math.pi / 2 * torch.rand(len(ids), 1, device=ids.device))
        drawn = torch.rand(ids.shape, device=ids.device)
        is_masked = drawn <= torch.maximum(share, drawn.amin(1, keepdim=True))  # at least one
        sequence = torch.cat([classes[:, None], ids.masked_fill(is_masked, masked)], dim=1)
        targets = torch.cat([torch.full_like(classes, -100)[:, None], ids.masked_fill(~is_masked, -100)], dim=1)
        return model(input_ids=sequence, labels=targets).loss

    torch.manual_seed(arguments.seed)
    model = train(make_model(tokens, arguments.hidden_size, arguments.num_layers), loss_of, tokens, arguments, folder)
    if not PartialState().is_main_process:
        return {}
    settings = (arguments.num_steps, arguments.temperature, arguments.choice_temperature, arguments.guidance_scale)
    return show(lambda labels: generate(model, tokens, labels, *settings), tokens, arguments, folder)


if __name__ == "__main__":
    main()
