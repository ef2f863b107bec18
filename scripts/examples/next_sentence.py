"""Recommend the next item by generating its semantic id: here the next sentence of a documentation, with a small Llama.

    pip install "optvq_hf[train]"
    python scripts/examples/next_sentence.py

Sentences and ids are those of semantic_ids.py; a last number tells sentences apart that share their codes. The Llama learns
sequences of ids, and `generate()` searches those of the next sentence with beams, held to ids that exist by a tree of their
prefixes (`prefix_allowed_tokens_fn`). A tenth of the documents is held out. "no codes" has codes drawn at random as ids.
"""

import argparse
import statistics

import torch
from rival_quantizers import earlier_runs, list_runs, save_run, table
from semantic_ids import embed, group_sizes, ids_parser, read_documents, train_quantizer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM


COLUMNS = {
    "shared_percent": "sentences that share their codes, %",
    "hits_at_1": "hits at 1, %",
    "hits_at_10": "hits at 10, %",
    "unseen_hits_at_10": "of sentences never seen, %",
}
IGNORED = -100  # label of positions that are not learned


class Ids:
    """Ids of items as tokens: one for each level, with a range of its own, then one that tells items with the same codes apart.

    Args:
        codes: (N, levels) in [0, codebook_size).

    Attributes:
        tokens: (N, levels + 1), all rows different.
        vocab_size: With the token that begins every sequence, the last one.
    """

    def __init__(self, codes: Tensor, codebook_size: int):
        seen: dict[tuple[int, ...], int] = {}
        numbers = []
        for row in map(tuple, codes.tolist()):
            numbers.append(seen.get(row, 0))
            seen[row] = numbers[-1] + 1
        levels = codes.shape[1]
        with_number = torch.cat([codes, torch.tensor(numbers)[:, None]], dim=1)
        self.tokens = with_number + codebook_size * torch.arange(levels + 1)
        self.begin = levels * codebook_size + max(seen.values())
        self.vocab_size = self.begin + 1
        self.item_of = {tuple(row): item for item, row in enumerate(self.tokens.tolist())}
        self.following: dict[tuple[int, ...], list[int]] = {}
        for prefix in sorted({row[:length] for row in self.item_of for length in range(1, levels + 2)}):
            self.following.setdefault(prefix[:-1], []).append(prefix[-1])

    def prompt(self, items: list[int]) -> Tensor:
        """The tokens of a sequence of items, after the one that begins it."""
        return torch.cat([torch.tensor([self.begin]), self.tokens[items].flatten()])


def windows(documents: list[list[int]], context: int) -> list[list[int]]:
    """Every item of a document but the first, after up to `context` items before it."""
    return [document[max(0, end - context) : end + 1] for document in documents for end in range(1, len(document))]


def hold_out(documents: list[list[int]], context: int) -> tuple[list[list[int]], list[list[int]], set[int]]:
    """Sequences to learn, those of every tenth document as tests, and the items that are in one to learn.

    An item alone in its document is in none.
    """
    held_out, learned = documents[::10], [document for number, document in enumerate(documents) if number % 10]
    sequences = windows(learned, context)
    return sequences, windows(held_out, context), {item for sequence in sequences for item in sequence}


def train_model(ids: Ids, sequences: list[list[int]], arguments: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    length = 1 + (arguments.context + 1) * ids.tokens.shape[1]
    config = LlamaConfig(
        vocab_size=ids.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=ids.begin,
        eos_token_id=None,
        pad_token_id=ids.begin,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1 - 0.95 * step / arguments.model_steps)
    )
    for _ in tqdm(range(arguments.model_steps), desc="learning sequences", disable=None):
        chosen = torch.randint(len(sequences), (arguments.model_batch_size,), generator=generator)
        prompts = [ids.prompt(sequences[index]) for index in chosen]
        tokens = torch.full((len(prompts), length), ids.begin)
        labels = torch.full_like(tokens, IGNORED)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = labels[row, : len(prompt)] = prompt
        model(input_ids=tokens, labels=labels).loss.backward()  # causal: padding at the end changes nothing
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.inference_mode()
def recommend(model: LlamaForCausalLM, ids: Ids, contexts: list[list[int]], number: int = 10) -> list[list[int]]:
    """The `number` items that the model holds most likely after each context, likeliest first; contexts of one length."""
    prompts = torch.stack([ids.prompt(context) for context in contexts])
    start = prompts.shape[1]
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        prefix_allowed_tokens_fn=lambda _, sequence: ids.following[tuple(sequence[start:].tolist())],
        max_new_tokens=ids.tokens.shape[1],
        num_beams=number,
        num_return_sequences=number,
        do_sample=False,
        pad_token_id=ids.begin,
    )
    items = [ids.item_of[tuple(row)] for row in found[:, start:].tolist()]
    return [items[first : first + number] for first in range(0, len(items), number)]


def count_hits(model: LlamaForCausalLM, ids: Ids, tests: list[list[int]], seen: set[int]) -> dict:
    """How often the last item of a sequence is among those recommended after the others, in percent."""
    ranks: list[tuple[int, int | None]] = []
    for length in sorted({len(sequence) for sequence in tests}):
        alike = [sequence for sequence in tests if len(sequence) == length]
        for first in range(0, len(alike), 50):
            part = alike[first : first + 50]
            for sequence, items in zip(part, recommend(model, ids, [sequence[:-1] for sequence in part])):
                ranks.append((sequence[-1], items.index(sequence[-1]) if sequence[-1] in items else None))
    at_10 = [(item, rank is not None) for item, rank in ranks]
    unseen = [hit for item, hit in at_10 if item not in seen]
    return {
        "hits_at_1": 100 * statistics.mean(rank == 0 for _, rank in ranks),
        "hits_at_10": 100 * statistics.mean(hit for _, hit in at_10),
        "unseen_hits_at_10": 100 * statistics.mean(unseen) if unseen else 0.0,
        "tests": len(ranks),
        "unseen_tests": len(unseen),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = ids_parser(__doc__.splitlines()[0], "runs/next_sentence", "drawn")
    parser.set_defaults(rivals=["transport_ema", "nearest_ema", "drawn"])
    parser.add_argument("--context", default=3, type=int, help="Sentences that the next one is told from, at most")
    parser.add_argument("--tests", default=500, type=int, help="Held-out sentences to recommend")
    parser.add_argument("--model-steps", default=400, type=int, help="Steps of training the Llama")
    parser.add_argument("--model-batch-size", default=64, type=int, help="Sequences per step")
    parser.add_argument("--hidden-size", default=96, type=int, help="Width of the Llama")
    parser.add_argument("--num-layers", default=2, type=int, help="Layers of the Llama")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = make_parser().parse_args(argv)
    runs = earlier_runs(arguments)
    documents = read_documents(arguments.packages)
    sentences = list(dict.fromkeys(sentence for document in documents for sentence in document))
    position = {sentence: item for item, sentence in enumerate(sentences)}
    of_items = [[position[sentence] for sentence in document] for document in documents]
    sequences, tests, seen = hold_out(of_items, arguments.context)
    order = torch.randperm(len(tests), generator=torch.Generator().manual_seed(0))[: arguments.tests]
    tests = [tests[index] for index in order]
    print(f"{len(sentences)} sentences, {len(sequences)} sequences to learn from, {len(tests)} tests")
    embeddings = embed(sentences, arguments.model)
    for seed, rival, start in list_runs(arguments, runs):
        if rival == "drawn":
            generator = torch.Generator().manual_seed(seed)
            codes = torch.randint(arguments.codebook_size, (len(sentences), arguments.levels), generator=generator)
        else:
            with torch.no_grad():
                codes = train_quantizer(rival, start, seed, embeddings, arguments)(embeddings).codes
        shared = 100 * (group_sizes(codes) > 1).float().mean().item()
        ids = Ids(codes, arguments.codebook_size)
        model = train_model(ids, sequences, arguments, seed)
        hits = count_hits(model, ids, tests, seen)
        run = {"rival": rival, "start": start, "seed": seed, "shared_percent": shared, **hits}
        save_run(arguments, runs, run, sentences=len(sentences), sequences=len(sequences))
    print(table(runs, COLUMNS))
    return runs


if __name__ == "__main__":
    main()
