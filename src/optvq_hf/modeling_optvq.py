"""The OptVQ model: image -> encoder -> optimal-transport vector quantizer -> decoder -> image (arXiv 2412.15195)."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple

from .backbone_optvq import BACKBONES
from .codes_optvq import check_codes
from .configuration_optvq import OptVQConfig
from .model_quantizer_optvq import MODEL_QUANTIZERS, make_quantizer
from .outputs_optvq import OptVQDecoderOutput, OptVQEncoderOutput, OptVQOutput
from .solver_inputs import DTYPES, check_tensor, check_values
from .tiling_optvq import check_tile_size, run_in_tiles
from .token_ids_optvq import TokenIdsMixin
from .weight_shapes_optvq import check_shapes, make_anew


# Pixel values lie in [-1, 1]. Noise may be added; values of 0 to 255 are a mistake.
LARGEST_PIXEL = 10.0


class OptVQModel(TokenIdsMixin, PreTrainedModel):
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
    _keys_to_ignore_on_load_missing = _keys_to_ignore_on_load_unexpected = [r"quantizer\.(levels\.\d+\.)?ema_"]
    _no_split_modules = ["OptVQResnetBlock", "OptVQAttentionBlock", *(kind.__name__ for kind in MODEL_QUANTIZERS)]

    def __init__(self, config: OptVQConfig):
        config = copy.deepcopy(config)  # two models of one configuration do not change each other
        super().__init__(config)
        config.validate()  # from_pretrained(..., field=value) overrides fields without checking that they fit together
        self.encoder, self.decoder = BACKBONES[config.backbone](config)
        self.quant_conv, self.post_quant_conv = nn.Identity(), nn.Identity()
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(config.encoder_channels, config.codebook_dim, kernel_size=1)
            self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.backbone_channels, kernel_size=1)
        self.quantizer = make_quantizer(config)
        self._fixed_fields = config.fixed_fields
        self.gradient_checkpointing = False
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        """Keeps the quantizer at this model's configuration, whichever of the two is replaced."""
        super().__setattr__(name, value)
        if name in ("config", "quantizer") and isinstance(self._modules.get("quantizer"), MODEL_QUANTIZERS):
            self.quantizer.bind(self.config)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers; frozen codes stay frozen, and results repeat to the last bit.

        With `ignore_mismatched_sizes=True`, `codebook_size` and `num_codebook_heads` may be given other values: the codebook is
        made anew, with its projection and running state, and a warning says so.

        On CPUs, weights that are not aligned to 64 bytes are copied: safetensors 0.8 maps them from the file at any offset, and
        kernels round differently on unaligned memory. Weights that stay on the disk are not.

        Raises:
            RuntimeError: If the checkpoint has weights of another shape; before anything is allocated.
            ValueError: If the checkpoint has weights that the model does not have.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded  # transformers annotates the model alone
        if info["unexpected_keys"]:
            some = ", ".join(sorted(info["unexpected_keys"])[:3])
            raise ValueError(
                f"the checkpoint has {len(info['unexpected_keys'])} weights that the model does not have ({some}): fields that "
                "decide layers must be those of the checkpoint (for attention, attn_resolutions with attn_image_size)"
            )
        if hasattr(model.config, "custom_pipelines"):  # their code is not saved with this model
            delattr(model.config, "custom_pipelines")
        make_anew(model, {key for key, *_ in info["mismatched_keys"]}, set(info["missing_keys"]))
        model.quantizer.freeze()  # transformers 5.23 loads every parameter with requires_grad=True
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
    ) -> Any:
        """As in transformers (5.23), which would first allocate what the checkpoint does not fit."""
        files = [file for file in checkpoint_files or () if str(file).endswith(".safetensors")]
        if state_dict is None and files:
            check_shapes(model, files, load_config.ignore_mismatched_sizes)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder includes the model's code, for machines where this package is not installed."""
        self._check_config()
        also = {"AutoModelForImageToImage": "modeling_optvq.OptVQModel"}  # "AutoModel" is added by transformers
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **also}
        super().save_pretrained(*args, **kwargs)

    def _check_config(self) -> None:
        """Raises ValueError if a field of the configuration was changed that may not."""
        if torch.compiler.is_compiling():
            return
        if getattr(self.quantizer, "config", None) is not self.config:
            raise ValueError("model.quantizer must be an OptVQModelQuantizer of model.config, which holds its settings")
        if self.config.fixed_fields == self._fixed_fields:
            return
        for name, value in self.config.fixed_fields.items():
            if value != self._fixed_fields[name]:
                raise ValueError(
                    f"model.config.{name} was changed from {self._fixed_fields[name]} to {value}, which would have no effect: "
                    "set it back, or make or load a model with the new value"
                )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises modules as torch does. transformers protects tensors that were loaded from being overwritten."""
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    def get_codebook(self) -> torch.Tensor:
        """The code vectors, after the projection, level by level: (num_quantizers * codebook_size, head_dim).

        At least float32 whatever the model's dtype.
        """
        return self.quantizer.get_codebook()

    @can_return_tuple
    def encode(
        self,
        pixel_values: torch.Tensor,
        assignment: str | None = None,
        return_loss: bool = True,
        output_hidden_states: bool | None = None,
        tile_size: int | None = None,
    ) -> OptVQEncoderOutput:
        """Encodes images to codes.

        Args:
            pixel_values: (B, num_channels, H, W) float in [-1, 1], H and W multiples of f.
            assignment: "nearest", "potentials", "sinkhorn", "sample" or "soft"; by default `config.training_assignment`
                in training mode and `config.inference_assignment` in evaluation mode. With the first two, the codes of
                an image do not depend on the other images of the batch.
            return_loss: Also compute the quantizer's loss, perplexity, code counts and marginal error.
            output_hidden_states: Also return the encoder's feature maps; by default `config.output_hidden_states`.
            tile_size: Side in pixels of the tiles that large images are encoded in, at least f; see [`run_in_tiles`]. In
                evaluation mode, without gradients and without hidden states. By default images are encoded whole.

        Raises:
            ValueError: For a wrong number of channels, a size that f does not divide, NaN or inf, an unknown assignment, and a
                `tile_size` that is too small or of no use here.
        """
        self._check_config()
        self._check_pixel_values(pixel_values)
        self._check_tile_size(tile_size, pixel_values)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states and tile_size is not None:
            raise ValueError("hidden states are whole feature maps: pass output_hidden_states=False with tile_size")
        feature_maps: list[torch.Tensor] | None = [] if output_hidden_states else None
        latents = self._encode(pixel_values.to(self.dtype), feature_maps, tile_size)
        if tile_size is not None:  # else the last layer alone would have a gradient
            latents = latents.detach()
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
    def decode(
        self, quantized: torch.Tensor | None = None, codes: torch.Tensor | None = None, tile_size: int | None = None
    ) -> OptVQDecoderOutput:
        """Decodes quantized latents, or codes alone, to images.

        Args:
            quantized: (B, codebook_dim, H/f, W/f) float, as `encode` returns it.
            codes: integer in [0, codebook_size), (B, codes_per_token, H/f, W/f), or those of the first levels, for a coarser
                image. Give exactly one of the two.
            tile_size: Side in pixels of the tiles that large images are decoded in, as in [`OptVQModel.encode`].

        Raises:
            ValueError: For both or neither, a wrong shape or dtype, NaN or inf, a `tile_size` that is too small or of no use.
            IndexError: For codes out of range.
        """
        given = codes if quantized is None else quantized
        if given is None or (quantized is not None and codes is not None):
            raise ValueError(f"pass exactly one of quantized and codes, got {'neither' if given is None else 'both'}")
        self._check_config()
        check_tensor(given, "quantized" if codes is None else "codes")
        if given.ndim != 4 or 0 in given.shape[1:]:
            raise ValueError(
                f"quantized and codes must have 4 dimensions, none of size 0, got shape {tuple(given.shape)}"
            )
        if quantized is None:
            quantized = self.quantizer.lookup(check_codes(given, self.config.codebook_size))
        elif quantized.dtype not in DTYPES:
            raise ValueError(
                f"quantized must be floats, got {quantized.dtype}; codes are passed by keyword: decode(codes=...)"
            )
        elif quantized.shape[1] != self.config.codebook_dim:
            raise ValueError(
                f"quantized must be (B, {self.config.codebook_dim}, H, W), got {tuple(quantized.shape)}; "
                "codes are passed by keyword: decode(codes=...)"
            )
        check_values(quantized, "quantized")
        self._check_tile_size(tile_size, given)
        return OptVQDecoderOutput(self._decode(quantized, tile_size))

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
        encode: Callable[..., OptVQEncoderOutput] = self.encode  # annotated without `return_dict` of its decorator
        options = {"assignment": assignment, "output_hidden_states": output_hidden_states, "return_dict": True}
        encoded = encode(pixel_values, return_loss=return_loss, **options)
        assert encoded.quantized is not None
        reconstruction = self._decode(encoded.quantized)
        loss = None
        if encoded.quantizer_loss is not None:
            difference = reconstruction.float() - pixel_values.float()
            # A mean of nothing is NaN; an empty sum is 0.
            mean = torch.mean if difference.shape[0] else torch.sum
            loss = mean(difference.abs()) + mean(difference.square()) + encoded.quantizer_loss
        return OptVQOutput(
            loss,
            encoded.quantized,
            reconstruction,
            encoded.codes,
            encoded.latents,
            encoded.perplexity,
            encoded.hidden_states,
            encoded.quantizer_loss,
            encoded.code_counts,
            encoded.marginal_error,
        )

    def encoder_output(self, pixel_values: torch.Tensor, tile_size: int | None = None) -> torch.Tensor:
        """What the encoder alone gives of images: (B, config.encoder_channels, H/f, W/f).

        [`OptVQModel.latents_of`] makes latents of it. Arguments and errors as of [`OptVQModel.encode`].
        """
        self._check_config()
        self._check_pixel_values(pixel_values)
        self._check_tile_size(tile_size, pixel_values)
        return self._encode(pixel_values.to(self.dtype), tile_size=tile_size, finish=lambda features: features)

    def latents_of(self, encoder_output: torch.Tensor) -> torch.Tensor:
        """The latents (B, codebook_dim, H/f, W/f) that the quantizer gets, of (B, config.encoder_channels, H/f, W/f)."""
        latents = self.quant_conv(encoder_output)
        return F.normalize(latents, dim=1) if self.config.normalize_latents else latents

    def _encode(
        self,
        pixel_values: torch.Tensor,
        feature_maps: list[torch.Tensor] | None = None,
        tile_size: int | None = None,
        finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Latents of each image, at inference on CPUs identical to the last bit in every batch, so that its codes are too.

        PyTorch 2.14 rounds convolutions, group norm and attention by the size of the batch, an image's position in it, the
        memory format and the alignment. So images are encoded one by one, each in memory of its own. That costs the VQGAN
        little from 64 pixels on (small images take up to 3 times as long in large batches), but would double the time of the
        plain CNN on small images, which rounds the same in every batch of 2 or more (16 on a single thread, whose 1x1
        convolutions have a kernel of their own for less): there, small batches are padded.

        Args:
            finish: Called with the encoder's output instead of `latents_of`.
        """
        # Copies of feature maps would not be in the graph.
        keeps_graph = feature_maps is not None and torch.is_grad_enabled()
        if self.training or pixel_values.device.type != "cpu" or torch.compiler.is_compiling() or keeps_graph:
            return self._latents(pixel_values, feature_maps, tile_size, finish)
        batch_size, _, height, width = pixel_values.shape
        least, largest = (16, 9216) if torch.get_num_threads() == 1 else (2, 20480)
        if (
            self.config.backbone == "plain_cnn" and height * width <= largest
        ):  # of larger ones, single images are as fast
            padding = pixel_values.new_zeros(max(0, least - batch_size), *pixel_values.shape[1:])
            parts = [torch.cat([pixel_values, padding]).contiguous()]
        else:
            parts = list(pixel_values.split(1))
            if tile_size is None:  # tiles are in memory of their own
                parts = [image.clone(memory_format=torch.contiguous_format) for image in parts]
        maps_of_parts: list[list[torch.Tensor]] = [[] for _ in parts]
        latents = [
            self._latents(part, None if feature_maps is None else maps, tile_size, finish)
            for part, maps in zip(parts, maps_of_parts)
        ]
        if feature_maps is not None:
            feature_maps[:] = [torch.cat(maps)[:batch_size] for maps in zip(*maps_of_parts)]
        return torch.cat(latents)[:batch_size]

    def _latents(
        self,
        pixel_values: torch.Tensor,
        feature_maps: list[torch.Tensor] | None,
        tile_size: int | None,
        finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if tile_size is None:
            features = self.encoder(pixel_values, feature_maps)
        else:
            features = run_in_tiles(self.encoder, pixel_values, 1, tile_size, self.config.downsample_factor)
        return (finish or self.latents_of)(features)

    def _decode(self, quantized: torch.Tensor, tile_size: int | None = None) -> torch.Tensor:
        latents = self.post_quant_conv(quantized.to(self.dtype))
        if tile_size is None:
            return self.decoder(latents)
        factor = self.config.downsample_factor
        return run_in_tiles(self.decoder, latents, factor, tile_size, factor)

    def check_tile_size(self, tile_size: int | None) -> None:
        """Raises ValueError for a `tile_size` that encode and decode refuse, whatever the picture. None is fine."""
        if tile_size is None:
            return
        if self.config.backbone == "diffusers":
            raise ValueError("tile_size is not for autoencoders of diffusers, whose layers are not known here")
        factor = self.config.downsample_factor
        check_tile_size(self.encoder, self.config.num_channels, 1, tile_size, factor)
        check_tile_size(self.decoder, self.config.backbone_channels, factor, tile_size, factor)

    def _check_tile_size(self, tile_size: int | None, tensor: torch.Tensor) -> None:
        if tile_size is None:
            return
        self.check_tile_size(tile_size)
        if self.training:
            raise ValueError("tile_size is for evaluation mode: call model.eval() first, or train on crops")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError("tiles have no gradients: pass tile_size=None, or call under torch.no_grad()")

    def _check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        check_tensor(pixel_values, "pixel_values")
        channels, factor = self.config.num_channels, self.config.downsample_factor
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
            raise ValueError(
                f"pixel_values must be (B, {channels}, H, W), the model has num_channels={channels}, "
                f"got {tuple(pixel_values.shape)}"
            )
        if pixel_values.dtype not in DTYPES:
            raise ValueError(
                f"pixel_values must be floats in [-1, 1] (use OptVQImageProcessor), got {pixel_values.dtype}"
            )
        if any(size % factor or size == 0 for size in pixel_values.shape[2:]):
            raise ValueError(
                f"height and width of pixel_values must be divisible by the downsampling factor {factor}, "
                f"got {pixel_values.shape[2]} x {pixel_values.shape[3]}"
            )
        check_values(pixel_values, "pixel_values", LARGEST_PIXEL)


OptVQModel.register_for_auto_class("AutoModel")
