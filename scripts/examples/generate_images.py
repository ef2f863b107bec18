"""Train a Llama on tokens of images, class by class, and let `generate()` make new images.

    python scripts/examples/generate_images.py --evaluate
    accelerate launch scripts/examples/generate_images.py --dataset zalando-datasets/fashion_mnist --output-dir runs/clothes

Trains a tokenizer, tokenizes the dataset, trains the language model and saves a grid with a row per class. Called again, it
resumes where it was interrupted. Ids of the language model: the classes, "no class", then those of the tokenizer.
"""

import torch
from accelerate import PartialState
from token_training import Tokens, drop_classes, make_parser, read_tokens, show, train
from transformers import LlamaConfig, LlamaForCausalLM

from optvq_hf import OptVQLogitsProcessor


def make_model(tokens: Tokens, hidden_size: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokens.num_classes + 1 + tokens.tokenizer.config.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=1 + tokens.ids.shape[1],
        bos_token_id=None,  # a sequence is a class and the ids of one image
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def generate(
    model: LlamaForCausalLM,
    tokens: Tokens,
    labels: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """Draws ids (B, length) in [0, tokenizer.config.vocab_size) of classes (B,).

    With guidance, scores are u + guidance_scale * (c - u): log-probabilities c of the class and u of "no class".
    """
    no_class, first_token_id = tokens.num_classes, tokens.num_classes + 1
    prompt = labels[:, None].to(model.device)
    processor = OptVQLogitsProcessor(tokens.tokenizer.config, first_token_id, prompt_length=1)
    sequence = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        negative_prompt_ids=torch.full_like(prompt, no_class),
        guidance_scale=guidance_scale,
        logits_processor=[processor],
        max_new_tokens=processor.num_ids,
        do_sample=True,
        temperature=temperature,
        top_k=top_k,
    )
    return sequence[:, 1:] - first_token_id


def main(argv=None) -> dict:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--top-k", default=100, type=int, help="Draw from so many likeliest codes; 0 for all")
    arguments = parser.parse_args(argv)
    folder = arguments.output_dir / "autoregressive"
    tokens = read_tokens(arguments)
    no_class, first_token_id = tokens.num_classes, tokens.num_classes + 1

    def loss_of(model, ids, labels):
        classes = drop_classes(labels, no_class, arguments.class_dropout)
        sequence = torch.cat([classes[:, None], first_token_id + ids], dim=1)
        return model(input_ids=sequence, labels=sequence).loss

    torch.manual_seed(arguments.seed)
    model = train(make_model(tokens, arguments.hidden_size, arguments.num_layers), loss_of, tokens, arguments, folder)
    if not PartialState().is_main_process:
        return {}
    settings = (arguments.temperature, arguments.top_k, arguments.guidance_scale)
    return show(lambda labels: generate(model, tokens, labels, *settings), tokens, arguments, folder)


if __name__ == "__main__":
    main()
