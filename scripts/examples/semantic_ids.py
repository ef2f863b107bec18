"""Give every sentence of a collection a semantic id: a few codes, the first of which tell what it is about.

    pip install "optvq_hf[train]"
    python scripts/examples/semantic_ids.py

The sentences are the documentation of installed Python packages, read from their source. Without `--model` a sentence is
embedded by its words (TF-IDF, reduced by a singular value decomposition). With the name of a model it is embedded by that:

    pip install sentence-transformers
    python scripts/examples/semantic_ids.py --model sentence-transformers/all-MiniLM-L6-v2

Prints the codebook usage of every level, the error, how many sentences share their id, how many neighbours are kept, and what
stands under some first codes. `optvq ids` does the part from embeddings to ids, for a column of any dataset, in one command.
"""

import argparse
import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from rival_quantizers import add_flags, earlier_runs, list_runs, make_quantizer, save_run, start_codes, table, usage
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from optvq_hf.training.checkpoints import write_whole


COLUMNS = {
    "usage_percent": "usage of each level, %",
    "error_percent": "error, % of the variance",
    "shared_percent": "sentences that share their id, %",
    "largest_group": "most with one id",
    "recall_percent": "of 10 neighbours kept, %",
}
WORDS = re.compile(r"[^\W_]+")
END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(])")


def read_documents(packages: list[str]) -> list[list[str]]:
    """The sentences of every docstring in the source of installed packages or modules, in their order.

    Sentences have 5 to 40 words; of those that differ in signs alone, all get the spelling of the first. Tests are not read.
    """
    spellings: dict[tuple[str, ...], str] = {}
    documents = []
    for package in packages:
        for docstring in _docstrings(_sources(package)):
            document = []
            for paragraph in re.split(r"\n\s*\n", docstring):
                for sentence in END_OF_SENTENCE.split(" ".join(paragraph.split())):
                    words = tuple(WORDS.findall(sentence.lower()))
                    if 5 <= len(words) <= 40 and not sentence.startswith("..") and ">>>" not in sentence:
                        document.append(spellings.setdefault(words, sentence))
            documents.append(document)
    return [document for document in documents if document]


def _sources(package: str) -> list[Path]:
    """Files of a package without its tests, or the one of a module."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # "a.b" without a package "a"; an empty name
        spec = None
    if spec is None:
        raise SystemExit(f"no package {package!r} is installed")
    if spec.submodule_search_locations is None:
        paths = [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []
    else:
        folders = map(Path, spec.submodule_search_locations)
        found = ((folder, path) for folder in folders for path in sorted(folder.rglob("*.py")))
        paths = [path for folder, path in found if "tests" not in path.relative_to(folder).parts]
    if not paths:
        raise SystemExit(f"package {package!r} has no source in Python to read")
    return paths


def _docstrings(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def embed(sentences: list[str], model: str | None, dim: int = 64) -> Tensor:
    """Embeddings (N, dim) of equal length, whose entries have a mean square of 1.

    Args:
        model: Of sentence-transformers, with a width of its own; None for TF-IDF.
    """
    if model is None:
        counts = TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=WORDS.pattern).fit_transform(sentences)
        embeddings = torch.from_numpy(TruncatedSVD(dim, random_state=0).fit_transform(counts)).float()
    else:
        from sentence_transformers import SentenceTransformer

        embeddings = torch.from_numpy(SentenceTransformer(model).encode(sentences, show_progress_bar=True)).float()
    return F.normalize(embeddings, dim=1) * embeddings.shape[1] ** 0.5


def train_quantizer(rival: str, start: str, seed: int, embeddings: Tensor, arguments: argparse.Namespace) -> nn.Module:
    """Levels of codes for embeddings (N, dim); batches are the same for all rivals."""
    torch.manual_seed(seed)
    quantizer = make_quantizer(rival, arguments.levels, arguments.codebook_size, embeddings.shape[1])
    start_codes(quantizer, start, embeddings, arguments.batch_size, seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = [*quantizer.parameters()] or [nn.Parameter(torch.empty(0))]  # EMA codes may have none: AdamW wants one
    optimizer = torch.optim.AdamW(parameters, arguments.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.95 * step / arguments.max_steps)
    for _ in tqdm(range(arguments.max_steps), desc=f"{rival}, {start}, seed {seed}", disable=None):
        chosen = torch.randint(len(embeddings), (arguments.batch_size,), generator=generator)
        loss = quantizer(embeddings[chosen]).loss
        if loss.requires_grad:  # EMA codes learn without
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return quantizer.eval()


@torch.no_grad()
def measure(
    quantizer: nn.Module, embeddings: Tensor, queries: Tensor, arguments: argparse.Namespace
) -> tuple[Tensor, dict]:
    """Codes (N, levels) of embeddings, and what they keep of these; of neighbours, those of queries (Q,)."""
    output = quantizer(embeddings)
    sizes = group_sizes(output.codes)
    before, after = (neighbours(vectors, queries) for vectors in (embeddings, output.quantized))
    errors, variance = (output.quantized - embeddings).square(), (embeddings - embeddings.mean(0)).square()
    return output.codes, {
        "usage_percent": usage(output.codes, arguments.codebook_size),
        "error_percent": (100 * errors.mean() / variance.mean()).item(),
        "shared_percent": 100 * (sizes > 1).float().mean().item(),
        "largest_group": int(sizes.max()),
        "recall_percent": 100 * (before[:, :, None] == after[:, None]).any(2).float().mean().item(),
    }


def group_sizes(codes: Tensor) -> Tensor:
    """For every row of codes (N, levels), how many rows are like it, (N,)."""
    _, groups, sizes = codes.unique(dim=0, return_inverse=True, return_counts=True)
    return sizes[groups]


def neighbours(vectors: Tensor, queries: Tensor, number: int = 10) -> Tensor:
    """The vectors most alike in direction to those of queries (Q,), without themselves: (Q, number)."""
    directions = F.normalize(vectors, dim=1)
    similarities = directions[queries] @ directions.T
    similarities[torch.arange(len(queries)), queries] = -torch.inf
    return similarities.topk(min(number, len(vectors) - 1)).indices


def show_prefixes(sentences: list[str], codes: Tensor, number: int = 5) -> str:
    """What stands under some first codes: the words that distinguish it, and a sentence under each of three second codes."""
    counter = TfidfVectorizer(
        use_idf=False, norm=None, binary=True, stop_words="english", token_pattern=r"[A-Za-z]{3,}"
    )
    present = counter.fit_transform(sentences)
    names, everywhere = counter.get_feature_names_out(), torch.from_numpy(present.mean(0).A1)
    lines = []
    by_size = torch.bincount(codes[:, 0]).argsort(descending=True)[: len(codes[:, 0].unique())]
    for first in by_size[: (len(by_size) + 1) // 2][:: max(1, len(by_size) // (2 * number))][:number].tolist():
        rows = (codes[:, 0] == first).nonzero()[:, 0]
        share = torch.from_numpy(present[rows.numpy()].mean(0).A1)
        words = (share * ((share + 1e-3) / (everywhere + 1e-3)).log()).topk(min(4, len(names))).indices
        lines.append(f"{first}: {len(rows)} sentences, {', '.join(names[words.numpy()])}")
        deeper = codes[rows, min(1, codes.shape[1] - 1)]  # with a single level, one sentence of the first code
        for second in torch.bincount(deeper).argsort(descending=True)[: min(3, len(deeper.unique()))].tolist():
            row = rows[deeper == second][0]
            lines.append(f"    {'-'.join(map(str, codes[row].tolist()))}  {sentences[row][:90]}")
    return "\n".join(lines)


def show_first(arguments: argparse.Namespace) -> str:
    """What stands under some first codes of the first run that a command names, also if an earlier command made it."""
    seed, rival, start = list_runs(arguments, [])[0]
    path = arguments.output_dir / f"{rival}-{start}-{seed}.jsonl"
    if not path.exists():
        return f"no {path}: what stands under its codes is not shown"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shown = show_prefixes([row["sentence"] for row in rows], torch.tensor([row["codes"] for row in rows]))
    return f"What stands under some first codes ({rival}, {start}, seed {seed}):\n{shown}"


def make_parser() -> argparse.ArgumentParser:
    return ids_parser(__doc__.splitlines()[0], "runs/semantic_ids")


def ids_parser(description: str, output_dir: str, *more_rivals: str) -> argparse.ArgumentParser:
    """Flags of this example and of next_sentence.py."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add_flags(parser, output_dir, levels=3, max_steps=300, learning_rate=2e-2, more_rivals=more_rivals)
    parser.add_argument(
        "--packages", nargs="+", default=["sklearn"], help="Installed packages or modules, whose documentation is read"
    )
    parser.add_argument("--model", help="Name of a model of sentence-transformers; TF-IDF without")
    parser.add_argument("--batch-size", default=1024, type=int, help="Sentences per step")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = make_parser().parse_args(argv)
    runs = earlier_runs(arguments)
    documents = read_documents(arguments.packages)
    sentences = list(dict.fromkeys(sentence for document in documents for sentence in document))
    embeddings = embed(sentences, arguments.model)
    unlike = embeddings.round(decimals=3).unique(dim=0)
    print(f"{len(sentences)} sentences, {len(unlike)} different embeddings of width {embeddings.shape[1]}")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    queries = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(0))[:1000]
    for seed, rival, start in list_runs(arguments, runs):
        quantizer = train_quantizer(rival, start, seed, embeddings, arguments)
        codes, measured = measure(quantizer, embeddings, queries, arguments)
        rows = [{"sentence": sentence, "codes": of_one} for sentence, of_one in zip(sentences, codes.tolist())]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(arguments.output_dir / f"{rival}-{start}-{seed}.jsonl", lines)
        run = {"rival": rival, "start": start, "seed": seed, **measured}
        save_run(arguments, runs, run, sentences=len(sentences), embeddings=len(unlike))
    print(show_first(arguments))
    print(table(runs, COLUMNS))
    return runs


if __name__ == "__main__":
    main()
