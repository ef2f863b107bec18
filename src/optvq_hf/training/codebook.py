"""The codebook during training: first codes, schedules of the assignment, dead codes."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import nn

from ..configuration_optvq import OptVQConfig
from ..modeling_optvq import OptVQModel
from ..quantizer_optvq import OptVQQuantizer
from ..residual_optvq import ResidualLevels
from .arguments import CodebookArguments
from .processes import broadcast, gather, is_first


# Most features per code for k-means: more hardly change the clusters.
FEATURES_PER_CODE = 64


def note_schedules(config: OptVQConfig, arguments: CodebookArguments) -> None:
    """Records the schedules of epsilon and balance in the configuration; None without schedules."""
    schedules = {"sinkhorn_epsilon": arguments.epsilon_schedule, "sinkhorn_balance": arguments.balance_schedule}
    config.training_schedules = {name: list(pair) for name, pair in schedules.items() if pair is not None} or None


def follow_schedule(model: OptVQModel, arguments: CodebookArguments, step: int, total_steps: int) -> None:
    """Sets the quantizer's bypass, epsilon (geometric schedule) and balance (linear schedule) for a step, from 0.

    Epsilon and balance are fields of `model.config`, so a saved model has those of its last step.
    """
    progress = step / max(total_steps - 1, 1)
    model.quantizer.bypass = step < arguments.quantization_start
    if arguments.epsilon_schedule is not None:
        first, last = arguments.epsilon_schedule
        model.quantizer.epsilon = first * (last / first) ** progress
    if arguments.balance_schedule is not None:
        first, last = arguments.balance_schedule
        model.quantizer.balance = first + (last - first) * progress


def start_codebook(
    model: OptVQModel,
    batches: Iterable[torch.Tensor],
    arguments: CodebookArguments,
    seed: int,
    latents_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Sets the first codes to encoder features ("samples") or to the centres of their clusters ("kmeans").

    Uses the features of all heads and processes; rank 0 computes the codes and broadcasts them. Levels start one after the
    other, each on what those before it leave.

    Args:
        batches: (B, C, H, W) in [-1, 1], of which `arguments.codebook_start_batches` are taken.
        latents_of: Makes latents (B, codebook_dim, H/f, W/f) of a batch; by default the model encodes it.

    Raises:
        ImportError: If k-means is asked for and scikit-learn is not installed.
        ValueError: If there are fewer features than codes.
    """
    num_codes, num_batches = model.config.codebook_size, arguments.codebook_start_batches
    features = _features(model, islice(batches, num_batches), latents_of or encoding(model))
    if len(features) < num_codes:
        raise ValueError(
            f"--codebook-start {arguments.codebook_start} needs at least as many features as codes, got {len(features)} for "
            f"{num_codes}; raise --codebook-start-batches"
        )
    per_code = len(features) / num_codes / num_batches
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    features = features[chosen[: FEATURES_PER_CODE * num_codes]]
    for level, rest in what_levels_get(model.quantizer, features):
        codes = rest[:num_codes]
        if arguments.codebook_start == "kmeans" and is_first():
            codes = cluster_centres(rest, num_codes, seed)
        set_codebook(level, broadcast(codes.contiguous()), features_per_code=per_code)


@torch.no_grad()
def what_levels_get(
    quantizer: OptVQQuantizer | ResidualLevels, features: torch.Tensor
) -> Iterator[tuple[OptVQQuantizer, torch.Tensor]]:
    """Every level with what the nearest codes of those before it leave of features (N, head_dim).

    A level's codes may be set before the next is asked for.
    """
    for level in quantizer.levels:
        yield level, features
        if level is not quantizer.levels[-1]:
            codebook = level.get_codebook()
            features = features - codebook[level._nearest(features, codebook)]


def cluster_centres(features: torch.Tensor, num_clusters: int, seed: int) -> torch.Tensor:
    """Centres (num_clusters, d) of features (N, d), by minibatch k-means on the CPU.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ImportError('scikit-learn is not installed: run pip install "optvq_hf[train]"') from error
    settings = {"init": "random", "n_init": 1, "max_iter": 20, "batch_size": max(4096, 4 * num_clusters)}
    clusters = MiniBatchKMeans(num_clusters, random_state=seed, **settings).fit(features.cpu().float().numpy())
    return torch.from_numpy(clusters.cluster_centers_).to(features)


@torch.no_grad()
def _features(
    model: OptVQModel, batches: Iterable[torch.Tensor], latents_of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Encodes batches to the features of all heads and processes, (N, head_dim) float32."""
    return torch.cat([split_heads(gather(latents_of(batch)), model.quantizer.head_dim) for batch in batches])


def encoding(model: OptVQModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Makes latents (B, codebook_dim, H/f, W/f) of pixel values (B, C, H, W)."""

    def latents_of(pixel_values: torch.Tensor) -> torch.Tensor:
        was_training = model.training
        model.eval()
        encoded = model.encode(pixel_values.to(model.device), assignment="nearest", return_loss=False)
        model.train(was_training)
        assert encoded.latents is not None  # None only in outputs made by hand
        return encoded.latents

    return latents_of


def split_heads(latents: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Cuts latents into features of heads: (B, dim, H, W) -> (B * H * W * num_heads, head_dim) float32."""
    return latents.detach().movedim(1, -1).reshape(-1, head_dim).float()


@torch.no_grad()
def set_codebook(quantizer: OptVQQuantizer, codes: torch.Tensor, features_per_code: float = 1.0) -> None:
    """Sets the codebook to (codebook_size, head_dim) codes: copies them to the embedding and makes the projection the identity.

    Args:
        features_per_code: Number of features per code and step, with which the averages of an EMA codebook start.
    """
    quantizer.embedding.weight.copy_(codes)
    if not isinstance(quantizer.projection, nn.Identity):
        nn.init.eye_(quantizer.projection.weight)
        nn.init.zeros_(quantizer.projection.bias)
    quantizer.reset_parameters()  # the running state belongs to the old codes
    if quantizer.learns_by_average:
        quantizer.ema_counts.fill_(features_per_code)
        quantizer.ema_sums.copy_(features_per_code * codes)


@torch.no_grad()
def reseed(
    quantizer: OptVQQuantizer | ResidualLevels,
    dead: torch.Tensor,
    latents: torch.Tensor,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Moves dead codes onto features of the batch, drawn by rank 0, or what levels get of them; returns their number.

    Args:
        dead: bool, of all codes of all levels, the same in every process.
        latents: (B, dim, H, W) of the last step.
        optimizer: Its moments for these codes are set to 0.
    """
    parts = dead.split([level.codebook_size for level in quantizer.levels])
    if not any(numbers := [int(part.sum()) for part in parts]):
        return 0
    levels = what_levels_get(quantizer, split_heads(latents, quantizer.head_dim))
    for (level, features), part, number in zip(levels, parts, numbers):
        if number:
            _reseed(level, part, number, features, optimizer)
    return sum(numbers)


def _reseed(
    quantizer: OptVQQuantizer,
    dead: torch.Tensor,
    number: int,
    features: torch.Tensor,
    optimizer: torch.optim.Optimizer,
) -> None:
    """[`reseed`] for the `number` dead codes of one level, which gets these features (N, head_dim)."""
    drawn = torch.randint(len(features), (number,), device=features.device)
    codes = broadcast(features[drawn].contiguous())
    weight = quantizer.embedding.weight
    if not isinstance(quantizer.projection, nn.Identity):  # invert the projection, to get embeddings
        inverse = torch.linalg.pinv(quantizer.projection.weight.float())
        codes = (codes - quantizer.projection.bias) @ inverse.T
    weight[dead] = codes.to(weight.dtype)
    for moment in optimizer.state.get(weight, {}).values():
        if moment.shape == weight.shape:
            moment[dead] = 0
    for average in (quantizer.potentials, quantizer.last_potentials):
        average[dead] = 0
    if quantizer.learns_by_average:
        quantizer.ema_counts[dead] = quantizer.ema_counts[~dead].mean()
        quantizer.ema_sums[dead] = quantizer.ema_counts[dead][:, None] * codes
