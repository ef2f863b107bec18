"""The OptVQ quantizer: features to codes and back, with gradients for both. Usable alone in anyone's model."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from .codes_optvq import check_codes, perplexity
from .costs import COSTS, Cost
from .distances import working_dtype
from .gradients_optvq import GRADIENT_ESTIMATORS, LOSS_TYPES, codebook_loss, plan_averages, with_gradient
from .layouts_optvq import LAYOUTS, at_positions, channel_axis, check_mask, describe_layouts
from .outputs_optvq import QuantizerOutput
from .running_state import Projection, RunningState
from .sinkhorn import (
    Assignment,
    Normalization,
    nearest_assign,
    potentials_assign,
    sample_assign,
    sinkhorn_assign,
)
from .solver_choice import Solver, check_solver
from .solver_inputs import DTYPES, check_number, check_settings, check_tensor


ASSIGNMENTS = ("sinkhorn", "nearest", "sample", "soft", "potentials")
TRAINING_ASSIGNMENTS = ("sinkhorn", "nearest", "sample", "soft")
INFERENCE_ASSIGNMENTS = ("nearest", "sinkhorn", "potentials")
CODEBOOK_UPDATES = ("gradient", "ema")


class OptVQQuantizer(RunningState):
    """Vector quantization whose assignment is solved as optimal transport (OptVQ, arXiv 2412.15195).

    A feature of width `dim` is cut into `num_heads` contiguous chunks, and each is replaced by one of `codebook_size`
    vectors of width `dim / num_heads`, from one codebook shared by all heads. In training the features of the whole batch
    (of all processes, if torch.distributed is initialised, see `synchronize`) are assigned together, such that all codes are
    used.

    Args:
        codebook_size: Number of codes K.
        dim: Channels C of the input.
        num_heads: Heads B; must divide `dim`.
        epsilon, iterations, balance, normalization: Of the transport, see [`~sinkhorn.sinkhorn_assign`].
        warm_start: In training, start the transport at the potentials of the previous step: fewer rounds then reach the same
            marginal error.
        training_assignment: Rule in training mode: `"sinkhorn"` (most likely code of the transport plan), `"sample"` (draw
            from the plan), `"soft"` (average of all code vectors by the plan), `"nearest"`.
        inference_assignment: Rule in evaluation mode: `"nearest"`, `"potentials"` (balanced, by the transport's potentials
            averaged in training; like `"nearest"` before any training) or `"sinkhorn"`. With the first two, the codes of an
            input do not depend on the rest of the batch.
        use_projection: The codebook is `Linear(embedding)`, not the embedding itself.
        freeze_codebook: Train neither embedding nor projection.
        codebook_update: How codes learn: by the `"gradient"` of the loss (the paper), or as an EMA codebook (`"ema"`), in which
            codes are moving averages of the features assigned to them in all processes (the VQ-VAE's rule, with the
            transport's assignment). `"ema"` needs `use_projection=False`, and then `codebook_weight` has no effect.
        ema_decay: Decay of the EMA codebook per step; it averages over about 1 / (1 - ema_decay) steps.
        channels_first: Whether channels come second in the input, or last. By default last in (N, dim) and (B, T, dim), and
            second in (B, dim, H, W) and (B, dim, T, H, W). True reads three dimensions as (B, dim, T), False reads four as
            (B, H, W, dim). Shapes alone do not tell, if two axes have the same size.
        loss_type: `"l2"` or `"l1"`: `commitment_weight * mean(|z - sg(c)|^p) + codebook_weight * mean(|sg(z) - c|^p)` with
            sg = stop-gradient; `"cross_entropy"`: of the codes given softmax(-costs), without weights. Costs are as they are,
            so that `"cosine"`, whose costs lie in [0, 2], gives no code more than e^2 times the probability of another.
        commitment_weight, codebook_weight: The weights above. The second is the paper's `beta`.
        cost: What makes a code near: `"euclidean"`, `"squared_euclidean"` or `"cosine"`, see [`~sinkhorn.sinkhorn_assign`]. The
            losses, of `"l2"` and `"l1"`, stay those between features and code vectors.
        gradient_estimator: How the gradient with respect to `quantized` reaches the input: `"straight_through"`, unchanged, or
            `"rotation"`, turned and scaled as code vectors are turned from their features (Fifty et al. 2024).
        solver: `"auto"`, `"torch"` or `"fused"`: who does the work, see [`~sinkhorn.sinkhorn_assign`]. It is not part of the
            state.
        synchronize: Whose features a training batch has under torch.distributed: True, those of all processes; a process group
            (`torch.distributed.new_group`), those of the group; False, those of this process, whose counts, potentials and EMA
            codebook are then its own.

    Attributes:
        bypass: True returns the input as `quantized` in training mode; codes and loss are computed all the same. For the first
            steps of a training run, in which encoder and decoder train without quantization.
        defer_updates: True makes training batches collect their statistics instead of updating the running state (averaged
            potentials, warm start, EMA codebook) at once. [`apply_updates`] then updates it once for all of them.

    Under gradient checkpointing, a forward pass that is recomputed in the backward pass uses the same codebook and potentials
    as the first time, and does not update the running state.

    Raises:
        ValueError: For an unknown name, a `dim` that `num_heads` does not divide, `"ema"` with a projection.

    Example:

    ```python
    quantizer = OptVQQuantizer(codebook_size=1024, dim=64, num_heads=4)
    output = quantizer(torch.randn(8, 64, 16, 16))
    output.quantized.shape, output.codes.shape  # (8, 64, 16, 16), (8, 4, 16, 16)
    ```
    """

    def __init__(
        self,
        codebook_size: int = 1024,
        dim: int = 256,
        num_heads: int = 1,
        epsilon: float = 10.0,
        iterations: int = 5,
        balance: float = 1.0,
        normalization: Normalization = "zscore",
        training_assignment: str = "sinkhorn",
        inference_assignment: str = "nearest",
        use_projection: bool = True,
        freeze_codebook: bool = False,
        loss_type: str = "l2",
        commitment_weight: float = 1.0,
        codebook_weight: float = 0.25,
        warm_start: bool = False,
        codebook_update: str = "gradient",
        ema_decay: float = 0.99,
        cost: Cost = "euclidean",
        gradient_estimator: str = "straight_through",
        channels_first: bool | None = None,
        solver: Solver = "auto",
        synchronize: "bool | dist.ProcessGroup" = True,
    ):
        for name, number in {"codebook_size": codebook_size, "dim": dim, "num_heads": num_heads}.items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {number!r}")
        if dim % num_heads:
            raise ValueError(f"dim must be divisible by num_heads, got {dim} and {num_heads}")
        for name, switch in {"use_projection": use_projection, "freeze_codebook": freeze_codebook}.items():
            _check_name(name, switch, (True, False))
        _check_name("codebook_update", codebook_update, CODEBOOK_UPDATES)
        if codebook_update == "ema" and use_projection:
            raise ValueError('codebook_update="ema" moves the embedding itself: it needs use_projection=False')
        learns_by_average = codebook_update == "ema" and not freeze_codebook
        super().__init__(codebook_size, dim // num_heads, warm_start, learns_by_average, ema_decay)
        self.dim = dim
        self.num_heads = num_heads
        self.epsilon = epsilon
        self.iterations = iterations
        self.balance = balance
        self.normalization: Normalization = normalization
        self.training_assignment = training_assignment
        self.inference_assignment = inference_assignment
        self.loss_type = loss_type
        self.commitment_weight = commitment_weight
        self.codebook_weight = codebook_weight
        self.cost: Cost = cost
        self.gradient_estimator = gradient_estimator
        self.channels_first = channels_first
        self.solver: Solver = solver
        self.synchronize = synchronize
        self.bypass = False

        self.projection = Projection(self.head_dim, self.head_dim) if use_projection else nn.Identity()
        self._freeze_codebook = freeze_codebook
        self.freeze()
        self._check_settings()

    @property
    def levels(self) -> list["OptVQQuantizer"]:
        """Itself: the one level, where others have several (see [`~residual_optvq.ResidualOptVQQuantizer`])."""
        return [self]

    @property
    def freeze_codebook(self) -> bool:
        """Whether neither embedding nor projection learn; decided at construction."""
        return self._freeze_codebook

    def _check_settings(self) -> None:
        """Raises TypeError or ValueError for a setting out of its range: settings may change after construction."""
        check_settings(self.epsilon, self.iterations, self.normalization, self.balance)
        _check_name("training_assignment", self.training_assignment, TRAINING_ASSIGNMENTS)
        _check_name("inference_assignment", self.inference_assignment, INFERENCE_ASSIGNMENTS)
        _check_name("loss_type", self.loss_type, LOSS_TYPES)
        _check_name("cost", self.cost, COSTS)
        _check_name("gradient_estimator", self.gradient_estimator, GRADIENT_ESTIMATORS)
        _check_name("warm_start", self.warm_start, (True, False))
        check_solver(self.solver)
        if not (
            isinstance(self.synchronize, bool)
            or dist.is_available()
            and isinstance(self.synchronize, dist.ProcessGroup)
        ):
            raise ValueError(f"synchronize must be True, False or a group of this process, got {self.synchronize!r}")
        _check_name("channels_first", self.channels_first, (None, True, False))
        check_number(self.ema_decay, "ema_decay")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        for name in ("commitment_weight", "codebook_weight"):
            weight = getattr(self, name)
            check_number(weight, name)
            if not 0 <= weight < math.inf:
                raise ValueError(f"the loss weights must be finite, 0 or greater, got {name} {weight}")

    def freeze(self) -> None:
        """Excludes the codes from gradient training, if they are frozen or an EMA codebook."""
        if self.freeze_codebook or self.learns_by_average:
            self.embedding.requires_grad_(False)
            self.projection.requires_grad_(False)

    def get_codebook(self) -> torch.Tensor:
        """The code vectors, after the projection: (codebook_size, head_dim), at least float32 whatever the model's dtype."""
        # As calls of modules, whose hooks bring weights that accelerate has moved to the CPU or the disk.
        return self.projection(self.embedding())

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Turns codes back into quantized features.

        Args:
            codes: integer in [0, codebook_size), in a layout of [`QuantizerOutput`]; -1 gives zeros.

        Returns:
            The same layout with `dim` entries where the codes have `num_heads`, in the dtype of the embedding.

        Raises:
            ValueError: For a wrong shape or a dtype that is not an integer.
            IndexError: For codes out of range.
        """
        return self._vectors_of(codes).to(self.embedding.weight.dtype)

    def _vectors_of(self, codes: torch.Tensor, name: str = "codes") -> torch.Tensor:
        """What [`lookup`] returns, at least float32 whatever the embedding's dtype."""
        check_tensor(codes, name)
        axis = self._channel_axis(codes.ndim)
        if codes.ndim not in LAYOUTS or codes.shape[axis] != self.num_heads:
            raise ValueError(
                f"codes must be {self._layouts(self.num_heads)}, with {self.num_heads} heads, got {tuple(codes.shape)}"
            )
        codes = check_codes(codes, self.codebook_size, -1, name).movedim(axis, -1)
        is_masked = codes == -1
        vectors = F.embedding(codes.masked_fill(is_masked, 0), self.get_codebook()).masked_fill(is_masked[..., None], 0)
        return vectors.flatten(-2).movedim(-1, axis).contiguous()

    def forward(
        self,
        hidden_states: torch.Tensor,
        assignment: str | None = None,
        return_loss: bool = True,
        mask: torch.Tensor | None = None,
    ) -> QuantizerOutput:
        """Quantizes vectors, a sequence, a feature map or a video.

        Args:
            hidden_states: float, (N, dim), (B, T, dim), (B, dim, H, W) or (B, dim, T, H, W); see `channels_first`.
            assignment: Rule for this call, one of "sinkhorn", "nearest", "sample", "soft", "potentials"; by default that of
                the mode the module is in.
            return_loss: Also compute loss, perplexity and code counts.
            mask: bool, the shape of the input without channels: (N,), (B, T), (B, H, W) or (B, T, H, W). True where a position
                is real. Real positions get exactly what `quantizer(x[mask])` gives; the others, whatever stands there, take
                no part in anything.

        Raises:
            ValueError: For a wrong shape or dtype, also of the mask; an unknown assignment; NaN or inf at a real position.
        """
        if assignment is None:
            assignment = self.training_assignment if self.training else self.inference_assignment
        _check_name("assignment", assignment, ASSIGNMENTS)
        if not torch.compiler.is_compiling():
            self._check_settings()
        check_tensor(hidden_states, "hidden_states")
        axis = self._channel_axis(hidden_states.ndim)
        if hidden_states.ndim not in LAYOUTS or hidden_states.shape[axis] != self.dim:
            raise ValueError(f"hidden_states must be {self._layouts(self.dim)}, got {tuple(hidden_states.shape)}")
        if hidden_states.dtype not in DTYPES:
            raise ValueError(f"hidden_states must be floats, got {hidden_states.dtype}")

        positions = hidden_states.movedim(axis, -1)
        if mask is not None:
            check_mask(mask, positions)
        tokens = positions.reshape(-1, self.dim) if mask is None else positions[mask]  # (N, dim)
        features = tokens.reshape(-1, self.head_dim)  # (N num_heads, head_dim)
        codebook = self.get_codebook()
        dtype = working_dtype(features, codebook)
        features = features.to(dtype)
        codebook, start, recomputes = self._meet(features, codebook.to(dtype))

        vectors, codes, diagnostics = self._assign(features.detach(), codebook, assignment, start)
        loss = code_perplexity = None
        if return_loss:
            weights = self.commitment_weight, self.codebook_weight
            loss = codebook_loss(features, vectors, codebook, codes, self.loss_type, *weights, self.cost)
            counts = diagnostics["code_counts"] = self._count(codes)
            code_perplexity = perplexity(counts)

        if self.training and not recomputes and (len(features) > 0 or self._process_group() is not None):
            self._collect(features.detach(), codes, diagnostics)
            if not (self.defer_updates or self.waits):
                self.apply_updates()
        real = hidden_states
        if mask is not None:
            real = positions.masked_fill(~mask[..., None], 0).movedim(-1, axis)
        quantized, codes = (
            at_positions(values, positions.shape[:-1], mask, fill).movedim(-1, axis).contiguous()
            for values, fill in ((vectors.detach().view(-1, self.dim), 0), (codes.view(-1, self.num_heads), -1))
        )
        if self.bypass and self.training:
            quantized = real
        else:
            quantized = with_gradient(real, quantized, self.gradient_estimator, self.head_dim, axis)
        return QuantizerOutput(quantized, codes, loss, code_perplexity, diagnostics)

    def _channel_axis(self, ndim: int) -> int:
        return channel_axis(ndim, self.channels_first)

    def _layouts(self, channels: int) -> str:
        return describe_layouts(channels, self.channels_first)

    def _assign(
        self, features: torch.Tensor, codebook: torch.Tensor, assignment: str, start: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Assigns features: code vectors (N, head_dim) with their gradient to the codebook, codes (N,), and diagnostics.

        Args:
            start: (codebook_size,) potentials that the transport starts from, or None.
        """
        codes_only = codebook.detach()
        if assignment == "nearest":
            codes = self._nearest(features, codes_only)
            return F.embedding(codes, codebook), codes, {}
        if assignment == "potentials":
            state = self.potentials, self.cost_scale
            codes = potentials_assign(features, codes_only, *state, cost=self.cost, solver=self.solver)
            return F.embedding(codes, codebook), codes, {}

        codes, potentials, scale, marginal_error, _ = self._transport(features, codes_only, start)
        diagnostics = {"marginal_error": marginal_error, "potentials": potentials, "scale": scale}
        if assignment == "soft":
            return plan_averages(features, codebook, potentials, scale, self.cost), codes, diagnostics
        if assignment == "sample":
            codes = sample_assign(features, codes_only, potentials, scale, cost=self.cost)
        return F.embedding(codes, codebook), codes, diagnostics

    def _nearest(self, features: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        """The nearest code of every feature, (N,). A subclass may override the search.

        Args:
            features, codebook: (N, head_dim) and (codebook_size, head_dim) without gradients, float32 or float64.
        """
        return nearest_assign(features, codebook, cost=self.cost, solver=self.solver)

    def _transport(self, features: torch.Tensor, codebook: torch.Tensor, start: torch.Tensor | None) -> Assignment:
        """Solves the transport of all features. A subclass may override the solver.

        Args:
            features, codebook: As in `_nearest`.
            start: (codebook_size,) potentials to start from, or None.
        """
        return sinkhorn_assign(
            features,
            codebook,
            epsilon=self.epsilon,
            iterations=self.iterations,
            normalization=self.normalization,
            balance=self.balance,
            potentials=start,
            process_group=self._process_group(),
            cost=self.cost,
            solver=self.solver,
        )

    def extra_repr(self) -> str:
        return f"codebook_size={self.codebook_size}, dim={self.dim}, num_heads={self.num_heads}, loss_type={self.loss_type!r}"


def _check_name(what: str, name: object, known: tuple[object, ...]) -> None:
    if not any(name is one or (isinstance(name, str) and name == one) for one in known):
        raise ValueError(f"{what} must be one of {known}, got {name!r}")
