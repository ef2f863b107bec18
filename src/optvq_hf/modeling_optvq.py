"""The OptVQ model: image -> encoder -> optimal-transport vector quantizer -> decoder -> image (arXiv 2412.15195)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .backbone_optvq import OptVQDecoder, OptVQEncoder, OptVQPlainCNNDecoder, OptVQPlainCNNEncoder
from .configuration_optvq import OptVQConfig
from .quantizer_optvq import OptVQQuantizer


@dataclass
class OptVQEncoderOutput(ModelOutput):
    """Output of [`OptVQModel.encode`].

    Args:
        quantized: (B, codebook_dim, H/f, W/f), the code vectors.
        codes: int64 in [0, codebook_size), (B, num_codebook_heads, H/f, W/f).
        latents: (B, codebook_dim, H/f, W/f), the features before quantization.
        quantizer_loss: 0-dim, see [`OptVQQuantizer`].
        perplexity: 0-dim in [1, codebook_size], exponential of the entropy of the code frequencies in the batch.
        hidden_states: With `output_hidden_states=True`, the encoder's feature maps (B, channels, height, width), from full
            resolution to that of the tokens: the input of the first stage and the output of every stage of the VQGAN, or the
            maps at each resolution of the plain CNN.
        code_counts: (codebook_size,) int64, how often each code was used in the batch (in training, that of all processes).
        marginal_error: 0-dim in [0, 2], sum over codes of |mass - 1 / codebook_size|; None for assignments without transport.

    `quantizer_loss`, `perplexity`, `code_counts` and `marginal_error` are None with `return_loss=False`.
    """

    quantized: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    quantizer_loss: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    code_counts: torch.Tensor | None = None
    marginal_error: torch.Tensor | None = None


@dataclass
class OptVQDecoderOutput(ModelOutput):
    """Output of [`OptVQModel.decode`].

    Args:
        reconstruction: (B, num_channels, H, W), in [-1, 1] up to the decoder's error: it is not clamped.
    """

    reconstruction: torch.Tensor | None = None


@dataclass
class OptVQOutput(ModelOutput):
    """Output of [`OptVQModel`].

    Args:
        loss: 0-dim, what a plain training minimises: mean |x' - x| + mean (x' - x)^2 + quantizer_loss, for images x and their
            reconstructions x'; present only in training mode or with `return_loss=True`.
        quantized: (B, codebook_dim, H/f, W/f), the code vectors, with straight-through gradients.
        reconstruction: (B, num_channels, H, W), in [-1, 1] up to the decoder's error: it is not clamped.
        codes: int64 in [0, codebook_size), (B, num_codebook_heads, H/f, W/f).
        latents: (B, codebook_dim, H/f, W/f), the features before quantization.
        perplexity, hidden_states, quantizer_loss, code_counts, marginal_error: As in [`OptVQEncoderOutput`]; all but the
            hidden states are present with the loss.
    """

    loss: torch.Tensor | None = None
    quantized: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    perplexity: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    quantizer_loss: torch.Tensor | None = None
    code_counts: torch.Tensor | None = None
    marginal_error: torch.Tensor | None = None


class OptVQModel(PreTrainedModel):
    """Vector-quantized autoencoder with optimal-transport assignment (OptVQ, arXiv 2412.15195).

    Pixels are (B, num_channels, H, W) floats in [-1, 1]; H and W may be any multiples of `config.downsample_factor` f.

    Example:

    ```python
    model = OptVQModel(OptVQConfig(image_size=32, backbone="plain_cnn", codebook_size=1024, codebook_dim=8)).eval()
    encoded = model.encode(torch.rand(2, 3, 32, 32) * 2 - 1)
    pixels = model.decode(codes=encoded.codes).reconstruction
    ```
    """

    config: OptVQConfig
    base_model_prefix = "optvq"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    # A model may be trained further with or without an EMA codebook, so a checkpoint may lack its buffers or have more.
    _keys_to_ignore_on_load_missing = [r"quantizer\.ema_"]
    _keys_to_ignore_on_load_unexpected = [r"quantizer\.ema_"]
    _no_split_modules = ["OptVQResnetBlock", "OptVQAttentionBlock", "OptVQQuantizer"]

    def __init__(self, config: OptVQConfig):
        super().__init__(config)
        config.validate()  # from_pretrained(..., field=value) overrides fields without checking that they fit together
        plain = config.backbone == "plain_cnn"
        self.encoder = OptVQPlainCNNEncoder(config) if plain else OptVQEncoder(config)
        self.decoder = OptVQPlainCNNDecoder(config) if plain else OptVQDecoder(config)
        self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(config.backbone_channels, config.codebook_dim, kernel_size=1)
            self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.backbone_channels, kernel_size=1)
        self.quantizer = OptVQQuantizer(
            codebook_size=config.codebook_size,
            dim=config.codebook_dim,
            num_heads=config.num_codebook_heads,
            epsilon=config.sinkhorn_epsilon,
            iterations=config.sinkhorn_iterations,
            balance=config.sinkhorn_balance,
            warm_start=config.sinkhorn_warm_start,
            normalization=config.cost_normalization,
            training_assignment=config.training_assignment,
            inference_assignment=config.inference_assignment,
            use_projection=config.use_codebook_projection,
            freeze_codebook=config.freeze_codebook,
            codebook_update=config.codebook_update,
            ema_decay=config.codebook_ema_decay,
            loss_type=config.codebook_loss_type,
            commitment_weight=config.commitment_loss_weight,
            codebook_weight=config.codebook_loss_weight,
        )
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; frozen codes stay frozen, and results repeat to the last bit.

        On CPUs, weights that are not aligned to 64 bytes are copied: safetensors 0.8 maps them from the file at any offset, and
        kernels round differently on unaligned memory.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if hasattr(model.config, "custom_pipelines"):  # their code is not saved with this model
            delattr(model.config, "custom_pipelines")
        model.quantizer.freeze()  # transformers 5.23 loads every parameter with requires_grad=True
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        return loaded

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder includes the model's code, for machines where this package is not installed."""
        also = {"AutoModelForImageToImage": "modeling_optvq.OptVQModel"}  # "AutoModel" is added by transformers
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **also}
        super().save_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises modules as torch does. transformers protects tensors that were loaded from being overwritten."""
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def get_codebook(self) -> torch.Tensor:
        """The code vectors, after the projection: (codebook_size, head_dim), at least float32 whatever the model's dtype."""
        return self.quantizer.get_codebook()

    @can_return_tuple
    def encode(
        self,
        pixel_values: torch.Tensor,
        assignment: str | None = None,
        return_loss: bool = True,
        output_hidden_states: bool | None = None,
    ) -> OptVQEncoderOutput:
        """Encodes images to codes.

        Args:
            pixel_values: (B, num_channels, H, W) float in [-1, 1], H and W multiples of f.
            assignment: "nearest", "potentials", "sinkhorn", "sample" or "soft"; by default `config.training_assignment`
                in training mode and `config.inference_assignment` in evaluation mode. With the first two, the codes of
                an image do not depend on the other images of the batch.
            return_loss: Also compute the quantizer's loss, perplexity, code counts and marginal error.
            output_hidden_states: Also return the encoder's feature maps; by default `config.output_hidden_states`.

        Raises:
            ValueError: For a wrong number of channels, a size that f does not divide, NaN or inf, an unknown assignment.
        """
        self._check_pixel_values(pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        feature_maps: list[torch.Tensor] | None = [] if output_hidden_states else None
        latents = self._encode(pixel_values.to(self.dtype), feature_maps)
        output = self.quantizer(latents, assignment=assignment, return_loss=return_loss)
        return OptVQEncoderOutput(
            output.quantized,
            output.codes,
            latents,
            output.loss,
            output.perplexity,
            None if feature_maps is None else tuple(feature_maps),
            output.diagnostics.get("code_counts"),
            output.diagnostics.get("marginal_error") if return_loss else None,
        )

    @can_return_tuple
    def decode(self, quantized: torch.Tensor | None = None, codes: torch.Tensor | None = None) -> OptVQDecoderOutput:
        """Decodes quantized latents, or codes alone, to images.

        Args:
            quantized: (B, codebook_dim, H/f, W/f) float, as `encode` returns it.
            codes: integer in [0, codebook_size), (B, num_codebook_heads, H/f, W/f). Give exactly one of the two.

        Raises:
            ValueError: For both or neither, or a wrong shape or dtype.
            IndexError: For codes out of range.
        """
        given = codes if quantized is None else quantized
        if given is None or (quantized is not None and codes is not None):
            raise ValueError(f"pass exactly one of quantized and codes, got {'neither' if given is None else 'both'}")
        if given.ndim != 4:
            raise ValueError(f"quantized and codes must have 4 dimensions, got shape {tuple(given.shape)}")
        if quantized is None:
            quantized = self.quantizer.lookup(given)
        elif quantized.shape[1] != self.config.codebook_dim:
            raise ValueError(
                f"quantized must be (B, {self.config.codebook_dim}, H, W), got {tuple(quantized.shape)}; "
                "codes are passed by keyword: decode(codes=...)"
            )
        return OptVQDecoderOutput(self.decoder(self.post_quant_conv(quantized.to(self.dtype))))

    def to_token_ids(self, codes: torch.Tensor, first_token_id: int = 0) -> torch.Tensor:
        """Flattens codes to one sequence of ids for a language model.

        The order is row by row, and within a token head by head. Every head has ids of its own: code k of head b has the id
        `first_token_id + b * codebook_size + k`.

        Args:
            codes: integer, (B, num_codebook_heads, H/f, W/f).
            first_token_id: First id of the image tokens in the language model's vocabulary.

        Returns:
            int64 (B, H/f * W/f * num_codebook_heads), in [first_token_id, first_token_id + num_codebook_heads * codebook_size).
        """
        offsets = torch.arange(self.config.num_codebook_heads, device=codes.device) * self.config.codebook_size
        return (codes.movedim(1, -1) + offsets).flatten(1) + first_token_id

    def from_token_ids(
        self, token_ids: torch.Tensor, first_token_id: int = 0, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Inverts [`OptVQModel.to_token_ids`], for [`OptVQModel.decode`].

        Args:
            token_ids: integer, (B, length).
            first_token_id: As in `to_token_ids`.
            grid: Height and width in tokens; by default those of a `config.image_size` x `config.image_size` image.

        Returns:
            codes: int64 (B, num_codebook_heads, height, width).

        Raises:
            ValueError: If the length does not fit the grid, or an id does not belong to the head at its position.
        """
        size, heads = self.config.codebook_size, self.config.num_codebook_heads
        height, width = grid or (self.config.latent_size, self.config.latent_size)
        if token_ids.ndim != 2 or token_ids.shape[1] != height * width * heads:
            raise ValueError(
                f"token_ids must be (B, {height * width * heads}), {height} x {width} tokens of {heads} codes, got "
                f"{tuple(token_ids.shape)}"
            )
        offsets = torch.arange(heads, device=token_ids.device) * size
        codes = token_ids.unflatten(1, (height, width, heads)) - first_token_id - offsets
        if ((codes < 0) | (codes >= size)).any():
            raise ValueError(
                f"token_ids must run through the {heads} heads in turn, with ids of code + head * {size} + {first_token_id}"
            )
        return codes.movedim(-1, 1).long()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        return_loss: bool | None = None,
        assignment: str | None = None,
        output_hidden_states: bool | None = None,
    ) -> OptVQOutput:
        """Encodes and decodes images.

        Args:
            pixel_values: (B, num_channels, H, W) float in [-1, 1], H and W multiples of f.
            return_loss: Also compute the loss and its parts; by default in training mode only. A collator that returns
                `return_loss=True` beside the images makes `transformers.Trainer` report an eval_loss.
            assignment, output_hidden_states: As in [`OptVQModel.encode`].

        Raises:
            ValueError: As [`OptVQModel.encode`].
        """
        return_loss = self.training if return_loss is None else return_loss
        encode: Callable[..., OptVQEncoderOutput] = (
            self.encode
        )  # annotated without `return_dict`, which its decorator takes
        decode: Callable[..., OptVQDecoderOutput] = self.decode
        encoded = encode(
            pixel_values,
            assignment=assignment,
            return_loss=return_loss,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        decoded = decode(quantized=encoded.quantized, return_dict=True)
        loss = None
        if encoded.quantizer_loss is not None and decoded.reconstruction is not None:
            difference = decoded.reconstruction.float() - pixel_values.float()
            # A mean of nothing is NaN; an empty sum is 0.
            pixel_loss = (
                difference.abs().mean() + difference.square().mean() if difference.shape[0] else difference.sum()
            )
            loss = pixel_loss + encoded.quantizer_loss
        return OptVQOutput(
            loss,
            encoded.quantized,
            decoded.reconstruction,
            encoded.codes,
            encoded.latents,
            encoded.perplexity,
            encoded.hidden_states,
            encoded.quantizer_loss,
            encoded.code_counts,
            encoded.marginal_error,
        )

    def _encode(self, pixel_values: torch.Tensor, feature_maps: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Latents of each image, at inference on CPUs identical to the last bit in every batch, so that its codes are too.

        PyTorch 2.14 rounds convolutions, group norm and attention by the size of the batch, an image's position in it, the
        memory format and the alignment. So images are encoded one by one, each in memory of its own. That costs the VQGAN
        little, but would double the time of the plain CNN on small images, which rounds the same in every batch of 2 or more
        (16 on a single thread, whose 1x1 convolutions have a kernel of their own for less): there, small batches are padded.
        """
        # Copies of feature maps would not be in the graph.
        keeps_graph = feature_maps is not None and torch.is_grad_enabled()
        if self.training or pixel_values.device.type != "cpu" or torch.compiler.is_compiling() or keeps_graph:
            return self.quant_conv(self.encoder(pixel_values, feature_maps))
        batch_size, _, height, width = pixel_values.shape
        if self.config.backbone == "plain_cnn" and height * width <= 20480:  # larger ones choose by image again
            least = 16 if torch.get_num_threads() == 1 else 2
            padding = pixel_values.new_zeros(max(0, least - batch_size), *pixel_values.shape[1:])
            parts = [torch.cat([pixel_values, padding]).contiguous()]
        else:
            parts = [image.clone(memory_format=torch.contiguous_format) for image in pixel_values.split(1)]
        maps_of_parts: list[list[torch.Tensor]] = [[] for _ in parts]
        latents = [
            self.quant_conv(self.encoder(part, None if feature_maps is None else maps))
            for part, maps in zip(parts, maps_of_parts)
        ]
        if feature_maps is not None:
            feature_maps[:] = [torch.cat(maps)[:batch_size] for maps in zip(*maps_of_parts)]
        return torch.cat(latents)[:batch_size]

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        channels, factor = self.config.num_channels, self.config.downsample_factor
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must be (B, {channels}, H, W), the model has num_channels={channels}, "
                f"got {tuple(pixel_values.shape)}"
            )
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"pixel_values must be floats in [-1, 1] (use OptVQImageProcessor), got {pixel_values.dtype}"
            )
        if pixel_values.shape[2] % factor or pixel_values.shape[3] % factor:
            raise ValueError(
                f"height and width of pixel_values must be divisible by the downsampling factor {factor}, "
                f"got {pixel_values.shape[2]} x {pixel_values.shape[3]}"
            )
        if torch.compiler.is_compiling() or pixel_values.is_meta:
            return
        if not torch.isfinite(pixel_values).all():
            raise ValueError("found NaN or inf in pixel_values")


OptVQModel.register_for_auto_class("AutoModel")
