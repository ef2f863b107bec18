"""Residual quantization: each level quantizes what the levels before it have left. Usable alone in anyone's model."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .gradients_optvq import with_gradient
from .layouts_optvq import LAYOUTS, channel_axis, describe_layouts
from .outputs_optvq import QuantizerOutput
from .quantizer_optvq import OptVQQuantizer
from .solver_inputs import check_tensor


# What all levels have: one value is read if they agree, and otherwise a list, level by level; either may be set.
OF_THE_LEVELS = (
    "epsilon", "iterations", "balance", "normalization", "cost", "training_assignment", "inference_assignment", "loss_type",
    "commitment_weight", "codebook_weight", "warm_start", "ema_decay", "solver", "averaging_momentum", "max_starts",
)  # fmt: skip
# What all levels have, and have in common.
OF_THE_WHOLE = ("gradient_estimator", "defer_updates", "synchronize")


class ResidualLevels(nn.Module):
    """Levels of quantizers, each of which gets what is left of the features after the ones before it.

    Args:
        levels: Of the same width, heads and layout.
        quantizer_dropout: See [`ResidualOptVQQuantizer`].

    Attributes:
        levels: The quantizers.
        codebook_size: That of all levels; a list if they differ.
        bypass: As of [`~quantizer_optvq.OptVQQuantizer`].

    Also the settings [`OF_THE_LEVELS`] and [`OF_THE_WHOLE`].
    """

    epsilon: Any
    balance: Any
    gradient_estimator: Any
    defer_updates: Any
    solver: Any
    synchronize: Any

    def __init__(self, levels: Iterable[OptVQQuantizer], quantizer_dropout: bool = False):
        super().__init__()
        self.levels: Any = nn.ModuleList(levels)
        self.quantizer_dropout = quantizer_dropout
        self.bypass = False

    @property
    def num_quantizers(self) -> int:
        return len(self.levels)

    @property
    def codebook_size(self) -> Any:
        return _common([level.codebook_size for level in self.levels])

    @property
    def dim(self) -> int:
        return self.levels[0].dim

    @property
    def num_heads(self) -> int:
        return self.levels[0].num_heads

    @property
    def head_dim(self) -> int:
        return self.levels[0].head_dim

    @property
    def channels_first(self) -> bool | None:
        return self.levels[0].channels_first

    @property
    def freeze_codebook(self) -> bool:
        return all(level.freeze_codebook for level in self.levels)

    def get_codebook(self) -> torch.Tensor:
        """The code vectors of all levels, level by level: (sum of their codebook sizes, head_dim), at least float32."""
        return torch.cat([level.get_codebook() for level in self.levels])

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        """Turns codes, of all levels or of the first ones, back into quantized features.

        Args:
            codes: integer, in a layout of [`~outputs_optvq.QuantizerOutput`] with `num_heads` codes per level, level by level.
                The codes of fewer levels give a coarser decoding; -1 gives zeros.

        Returns:
            The same layout with `dim` entries, in the dtype of the embedding.

        Raises:
            ValueError: For a wrong shape or a dtype that is not an integer.
            IndexError: For codes out of range.
        """
        check_tensor(codes, "codes")
        axis = channel_axis(codes.ndim, self.channels_first)
        entries = [self.num_heads * number for number in range(1, self.num_quantizers + 1)]
        if codes.ndim not in LAYOUTS or codes.shape[axis] not in entries:
            most = self.num_quantizers
            raise ValueError(
                f"codes must be {describe_layouts(entries[-1], self.channels_first)}, with {self.num_heads} of each of {most} "
                f"levels, or those of the first levels, got {tuple(codes.shape)}"
            )
        parts = enumerate(codes.split(self.num_heads, dim=axis))
        vectors = [self.levels[number]._vectors_of(part, f"codes of level {number}") for number, part in parts]
        return _sum(vectors).to(self.levels[0].embedding.weight.dtype)

    def forward(
        self,
        hidden_states: torch.Tensor,
        assignment: str | None = None,
        return_loss: bool = True,
        mask: torch.Tensor | None = None,
    ) -> QuantizerOutput:
        """Quantizes vectors, a sequence, a feature map or a video, level by level.

        Arguments and errors as of [`~quantizer_optvq.OptVQQuantizer.forward`].
        """
        check_tensor(hidden_states, "hidden_states")
        rest, outputs = hidden_states, []
        if rest.is_floating_point():  # what is not is refused by the first level
            rest = rest.to(torch.promote_types(rest.dtype, self._dtype_of_codes()))
        shares_averages = self.training and self._shares_averages()
        with self._updating_together() if shares_averages else nullcontext():
            for level in self.levels[: self._draw_number(hidden_states)]:
                output = level(rest, assignment=assignment, return_loss=return_loss, mask=mask)
                outputs.append(output._replace(quantized=output.quantized.detach()))
                rest = rest - outputs[-1].quantized
        return self._joined(hidden_states, outputs, mask)

    def _dtype_of_codes(self) -> torch.dtype:
        """That of the code vectors, in which levels are summed: float32 or float64."""
        return torch.promote_types(self.levels[0].embedding.weight.dtype, torch.float32)

    def _joined(
        self, hidden_states: torch.Tensor, outputs: list[QuantizerOutput], mask: torch.Tensor | None
    ) -> QuantizerOutput:
        """The output of all levels, of those that were used."""
        axis = channel_axis(hidden_states.ndim, self.channels_first)
        real = hidden_states
        if mask is not None:
            real = real.movedim(axis, -1).masked_fill(~mask[..., None], 0).movedim(-1, axis)
        unused = self.levels[len(outputs) :]
        codes = [output.codes for output in outputs]
        codes += [torch.full_like(codes[0], -1) for _ in unused]
        if self.bypass and self.training:
            quantized = real
        else:
            total = _sum([output.quantized.to(self._dtype_of_codes()) for output in outputs])
            quantized = with_gradient(real, total, self.levels[0].gradient_estimator, self.head_dim, axis)
        loss = perplexity = None
        losses = [output.loss for output in outputs if output.loss is not None]
        if losses:
            # Every parameter gets a gradient: DistributedDataParallel waits for all.
            loss = _sum(losses) + sum(0 * level.get_codebook().sum() for level in unused)
            perplexity = torch.stack([output.perplexity for output in outputs if output.perplexity is not None]).mean()
        return QuantizerOutput(quantized, torch.cat(codes, dim=axis), loss, perplexity, self._diagnostics(outputs))

    def _diagnostics(self, outputs: list[QuantizerOutput]) -> dict[str, torch.Tensor]:
        """See [`~outputs_optvq.QuantizerOutput`]."""
        of_levels = [output.diagnostics for output in outputs] + [{}] * (len(self.levels) - len(outputs))
        joined = {}
        for name in dict.fromkeys(name for diagnostics in of_levels for name in diagnostics):
            known = [diagnostics[name] for diagnostics in of_levels if name in diagnostics]
            if name == "marginal_error":
                joined[name] = torch.stack(known).mean()
                continue
            shapes = [() if name == "scale" else (level.codebook_size,) for level in self.levels]
            values = [d[name] if name in d else known[0].new_zeros(shape) for d, shape in zip(of_levels, shapes)]
            joined[name] = torch.stack(values) if name == "scale" else torch.cat(values)
        return joined

    def _draw_number(self, hidden_states: torch.Tensor) -> int:
        """How many levels this batch uses: all, but with dropout any number in training, the same in all processes."""
        if not (self.training and self.quantizer_dropout):
            return self.num_quantizers
        drawn = torch.randint(1, self.num_quantizers + 1, (1,))
        group = self.levels[0]._process_group()
        if group is not None:
            drawn = drawn.to(hidden_states.device)
            dist.broadcast(drawn, group=group, group_src=0)
        return int(drawn.item())

    # ---- what training does to every level

    def reset_parameters(self) -> None:
        """As of [`~running_state.RunningState.reset_parameters`]."""
        for level in self.levels:
            level.reset_parameters()

    def freeze(self) -> None:
        """As of [`~quantizer_optvq.OptVQQuantizer.freeze`]."""
        for level in self.levels:
            level.freeze()

    def apply_updates(self, keep: torch.Tensor | None = None) -> None:
        """As of [`~running_state.RunningState.apply_updates`]."""
        if self._shares_averages():
            for level in self.levels[1:]:
                self.levels[0].take_features_of(level)
        for level in self.levels:
            level.apply_updates(keep)

    def _shares_averages(self) -> bool:
        """Whether levels share an EMA codebook."""
        return self.levels[-1].learns_by_average and self.levels[-1].code_owner is not self.levels[-1]

    @contextmanager
    def _updating_together(self) -> Iterator[None]:
        """Levels that share an EMA codebook quantize a batch by the same codes, which are updated once, after the last."""
        for level in self.levels:
            level.waits = True
        try:
            yield
        except BaseException:
            if not self.defer_updates:
                self.drop_updates()
            raise
        finally:
            for level in self.levels:
                level.waits = False
        if not self.defer_updates:
            self.apply_updates()

    def drop_updates(self) -> None:
        """As of [`~running_state.RunningState.drop_updates`]."""
        for level in self.levels:
            level.drop_updates()

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """As of [`~running_state.RunningState.deferring`]."""
        with ExitStack() as stack:
            for level in self.levels:
                stack.enter_context(level.deferring())
            yield


CARD = """---
{{ card_data }}
---

Levels of a vector quantizer whose assignment is optimal transport, made with [optvq_hf]({{ repo_url }}).

```python
from optvq_hf import ResidualOptVQQuantizer

quantizer = ResidualOptVQQuantizer.from_pretrained("this repository or folder")
codes = quantizer(embeddings).codes  # (N, dim) -> (N, levels)
```
"""


class ResidualOptVQQuantizer(
    ResidualLevels,
    PyTorchModelHubMixin,
    library_name="optvq_hf",
    repo_url="https://github.com/optvq-hf/optvq_hf",
    tags=["optvq", "vector-quantization"],
    model_card_template=CARD,
):
    """Residual vector quantization, each level of which is solved as optimal transport.

    The first level quantizes the features, every other what is left of them; quantized features and loss are sums over levels.
    So few levels of few codes replace one large codebook: 3 levels of 256 codes tell 2^24 vectors apart, and the first levels
    alone are a coarser code. `save_pretrained`, `from_pretrained` and `push_to_hub` are those of huggingface_hub: a folder has
    the arguments below in config.json and the weights in model.safetensors.

    Args:
        num_quantizers: Number of levels.
        codebook_size: Number of codes of every level, or a list, level by level.
        dim, num_heads: As of [`~quantizer_optvq.OptVQQuantizer`].
        epsilon: Of the transport, one number or a list.
        quantizer_dropout: In training, a batch uses the first levels only, as many as are drawn uniformly from 1 to all, so
            that the first levels alone decode well (Zeghidour et al. 2021, section III.C). Codes of the others are -1. torch's
            random generator draws, that of the first of several processes. Gradient checkpointing must draw the same number
            again: with `preserve_rng_state=False`, gradients are wrong.
        share_codebook: All levels use one codebook, with potentials of their own. A shared EMA codebook takes one update for
            the features of all levels together, after the last. safetensors' `save_file` refuses tensors with two names: use
            `safetensors.torch.save_model`, or `torch.save`.
        settings: The others of [`~quantizer_optvq.OptVQQuantizer`], for all levels.

    Raises:
        ValueError: For a list that does not have one entry per level, different sizes of a shared codebook, or as
            [`~quantizer_optvq.OptVQQuantizer`].

    Example:

    ```python
    quantizer = ResidualOptVQQuantizer(num_quantizers=3, codebook_size=256, dim=64)
    output = quantizer(torch.randn(1024, 64))
    coarse = quantizer.lookup(output.codes[:, :2])  # of the first two levels
    ```
    """

    def __init__(
        self,
        num_quantizers: int = 4,
        codebook_size: int | Sequence[int] = 1024,
        dim: int = 256,
        num_heads: int = 1,
        epsilon: float | Sequence[float] = 10.0,
        quantizer_dropout: bool = False,
        share_codebook: bool = False,
        **settings: Any,
    ):
        if not isinstance(num_quantizers, int) or isinstance(num_quantizers, bool) or num_quantizers < 1:
            raise ValueError(f"num_quantizers must be an integer of at least 1, got {num_quantizers!r}")
        for name, switch in {"quantizer_dropout": quantizer_dropout, "share_codebook": share_codebook}.items():
            if not isinstance(switch, bool):
                raise ValueError(f"{name} must be True or False, got {switch!r}")
        sizes = _one_per_level(codebook_size, num_quantizers, "codebook_size")
        epsilons = _one_per_level(epsilon, num_quantizers, "epsilon")
        if share_codebook and len(set(sizes)) > 1:
            raise ValueError(f"a shared codebook has one size, got codebook_size {sizes}")
        levels = [OptVQQuantizer(size, dim, num_heads, number, **settings) for size, number in zip(sizes, epsilons)]
        for level in levels[1:] if share_codebook else []:
            level.share_codes_of(levels[0])
        super().__init__(levels, quantizer_dropout)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **settings: Any) -> "ResidualOptVQQuantizer":
        """Refuses weights of another shape or with missing parts, unless told not to."""
        return super()._from_pretrained(strict=strict, **settings)


def _of_all_levels(name: str, takes_lists: bool) -> property:
    def get(quantizer: ResidualLevels) -> Any:
        return _common([getattr(level, name) for level in quantizer.levels])

    def change(quantizer: ResidualLevels, value: Any) -> None:
        if not takes_lists and isinstance(value, (list, tuple)):
            raise ValueError(f"{name} is one for all levels, got {value}")
        values = _one_per_level(value, quantizer.num_quantizers, name)
        for level, of_level in zip(quantizer.levels, values):
            setattr(level, name, of_level)

    return property(get, change)


for name in (*OF_THE_LEVELS, *OF_THE_WHOLE):
    setattr(ResidualLevels, name, _of_all_levels(name, takes_lists=name in OF_THE_LEVELS))


def _common(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _one_per_level(value: Any, number: int, name: str) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * number
    if len(values) != number:
        raise ValueError(f"{name} must have one entry per level, {number}, got {value}")
    return values


def _sum(vectors: list[torch.Tensor]) -> torch.Tensor:
    """In the order of the levels, so that codes give what features gave to the last bit."""
    total = vectors[0]
    for others in vectors[1:]:
        total = total + others
    return total
