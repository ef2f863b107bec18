"""Measures a transplant: a continuous autoencoder gets codes, by optimal transport and by other quantizers.

    python scripts/examples/train_autoencoder_kl.py --dataset path/to/images --output-dir runs/vae
    python scripts/benchmark_transplant.py --vae runs/vae --dataset path/to/images --output-dir runs/transplant_benchmark

Every quantizer gets the same whitened latents, steps and batches, and then the same steps of its decoder. All have about as
many bits: nearest and EMA codes have as many codes, FSQ about as many combinations of levels. Writes results.json and
reconstructions.png to the output folder. Started again, finished runs stay. A GPU is used where there is one. Needs the extras
`train`, `compare` and `fd`.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any


# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
import yaml  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from safetensors.torch import load_model, save_model  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.utils import make_grid  # noqa: E402
from vector_quantize_pytorch import FSQ, VectorQuantize  # noqa: E402

from optvq_hf import OptVQModel  # noqa: E402
from optvq_hf.commands.cli import main as optvq  # noqa: E402
from optvq_hf.commands.parser import RECIPES  # noqa: E402
from optvq_hf.commands.transplant import commands, make_parser  # noqa: E402
from optvq_hf.data.arguments import DataArguments  # noqa: E402
from optvq_hf.data.batches import evaluation_batches, training_batches  # noqa: E402
from optvq_hf.data.latents import latent_batches  # noqa: E402
from optvq_hf.evaluation.codecs import Codec, optvq_codec  # noqa: E402
from optvq_hf.evaluation.evaluator import Evaluation, evaluate_codecs  # noqa: E402
from optvq_hf.evaluation.protocols import LITE  # noqa: E402
from optvq_hf.evaluation.rivals import ADVISED, FSQ_LEVELS  # noqa: E402
from optvq_hf.image_processing_optvq import OptVQImageProcessor  # noqa: E402
from optvq_hf.tokenization import load_tokens  # noqa: E402
from optvq_hf.training.codebook import set_codebook, split_heads  # noqa: E402
from optvq_hf.training.optimization import make_optimizer, make_schedule  # noqa: E402


TITLES = {
    "transport": "transport (optvq transplant)",
    "nearest_kmeans": "nearest codes, k-means start",
    "ema": "EMA codes, k-means start, restart",
    "fsq": "FSQ",
}
METRICS = ("mse", "psnr", "ssim", LITE, "codebook_usage", "perplexity", "bits_per_pixel")
NEAREST = {"training_assignment": "nearest", "codebook_update": "gradient", "learning_rate": "1e-2"}
OF_TRANSPORT = ("epsilon_schedule", "balance_schedule", "codebook_ema_decay")
SHOWN = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHORT = {"max_steps": 25, "codebook_start_batches": 2, "codebook_start": "samples", "log_every": 5}
FEW = f"test[:{SHOWN}]"  # what the runs themselves evaluate; the figures here are of all test images


class Fsq(nn.Module):
    """FSQ of latents (B, dim, H, W), between two linear layers; heads as those of the codebooks."""

    def __init__(self, dim: int, codebook_size: int, num_heads: int):
        super().__init__()
        self.fsq = FSQ(list(FSQ_LEVELS[codebook_size]), num_codebooks=num_heads)
        self.before, self.after = nn.Linear(dim, self.fsq.dim), nn.Linear(self.fsq.dim, dim)
        for layer in (self.before, self.after):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        quantized, codes = self.fsq(self.before(latents.movedim(1, -1)).flatten(1, 2))
        return self._map(self.after(quantized), latents.shape[2:]), self._map(codes, latents.shape[2:])

    def lookup(self, codes: torch.Tensor) -> torch.Tensor:
        vectors = self.fsq.indices_to_codes(codes.movedim(1, -1).flatten(1, 2))
        return self._map(self.after(vectors), codes.shape[2:])

    @staticmethod
    def _map(rows: torch.Tensor, size: torch.Size) -> torch.Tensor:
        return rows.unflatten(1, size).movedim(-1, 1)


class Benchmark:
    """The runs of one output folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.output_dir
        self.folder.mkdir(parents=True, exist_ok=True)
        self.source, self.latents = self.folder / "model", self.folder / "transport" / "latents"
        self.data = DataArguments(dataset=options.dataset, num_workers=options.num_workers)
        shared = {"log_every": 10, "images_every": 0, "report_to": "none", "eval_images": 0, "save_every": 0}
        shared["num_workers"] = options.num_workers
        self.recipes = {
            "quantizer": {**shared, "max_steps": options.quantizer_steps, "batch_size": options.quantizer_batch},
            "decoder": {**shared, "max_steps": options.decoder_steps, "batch_size": options.decoder_batch},
        }

    def settings(self, stage: str) -> dict[str, Any]:
        """The shipped recipe of a stage, with the length of this benchmark."""
        return yaml.load(RECIPES[f"transplant_{stage}"].read_text(), yaml.BaseLoader) | self.recipes[stage]

    def recipe(self, stage: str, name: str = "", without: tuple[str, ...] = (), changes: dict | None = None) -> str:
        """The same with some changes, as a file."""
        settings = {key: value for key, value in self.settings(stage).items() if key not in without} | (changes or {})
        path = self.folder / f"{stage}{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    def run(self, *words: object) -> None:
        """Runs a command, unless its output folder holds what it makes."""
        folder = Path(str(words[words.index("--output-dir") + 1])) if "--output-dir" in words else self.source
        if not any((folder / name).is_file() for name in ("metrics.json", "manifest.json", "conversion.json")):
            print("optvq", *words, flush=True)
            optvq([str(word) for word in words])

    def transport(self) -> Path:
        """Ours, by the commands that `optvq transplant` runs, here in one process."""
        options = self.options
        new = ("--codebook-size", options.codebook_size, "--num-codebook-heads", options.num_heads)
        self.run("convert", options.vae, self.source, "--from", "diffusers", *new, "--image-size", options.image_size)
        self.processor(options.image_size).save_pretrained(self.source)
        recipes = ("--quantizer-config", self.recipe("quantizer"), "--decoder-config", self.recipe("decoder"))
        views = ("--flips", "--crops", options.crops, "--random-crop")
        of_data = ("--dataset", options.dataset, *views, "--output-dir", self.folder / "transport")
        words = [str(word) for word in ("--model", self.source, "--eval-split", FEW, *of_data, *recipes)]
        parser = make_parser()
        for stage in commands(*parser.parse(words), parser.given(words)):
            if "decoder" not in Path(stage[stage.index("--output-dir") + 1]).name or "transport" in options.decoders:
                self.run(*stage)
        return self.folder / "transport"

    def nearest_kmeans(self) -> Path:
        """The same commands without transport."""
        recipe, folder = self.recipe("quantizer", "_nearest", OF_TRANSPORT, NEAREST), self.folder / "nearest_kmeans"
        of_latents = ("--latents", self.latents, "--output-dir", folder / "quantizer", "--resume", "auto")
        of_data = ("--dataset", self.options.dataset, "--eval-split", FEW)
        self.run("train", "--config", recipe, "--model", self.source, *of_data, *of_latents)
        self.train_decoder(folder)
        return folder

    def ema(self) -> Path:
        """Codes of vector-quantize-pytorch, in the model that transport has trained."""
        folder = self.folder / "ema"
        if not (folder / "quantizer").is_dir():
            model, processor = self.load(self.folder / "transport" / "quantizer")
            torch.manual_seed(0)
            module = VectorQuantize(model.config.head_dim, model.config.codebook_size, rotation_trick=False, **ADVISED)
            module.to(DEVICE)
            for latents in self.latent_batches(model):
                module(split_heads(latents, model.config.head_dim)[None])
            set_codebook(model.quantizer.levels[0], module.codebook)
            model.save_pretrained(folder / "quantizer")
            processor.save_pretrained(folder / "quantizer")
        self.train_decoder(folder)
        return folder

    def train_decoder(self, folder: Path) -> None:
        if folder.name not in self.options.decoders:
            return
        words = ("--dataset", self.options.dataset, "--eval-split", FEW, "--random-crop", "--resume", "auto")
        models = ("--model", folder / "quantizer", "--output-dir", folder / "decoder")
        self.run("train", "--config", self.recipe("decoder"), *models, *words)

    def processor(self, crop: int) -> OptVQImageProcessor:
        size, crop_size = {"shortest_edge": self.options.resize}, {"height": crop, "width": crop}
        return OptVQImageProcessor(size=size, crop_size=crop_size)

    def codecs(self) -> dict[str, Codec]:
        """Everything that is compared: of each quantizer what the first stage has made, and the second."""
        codecs = {}
        for folder in (self.transport(), self.nearest_kmeans(), self.ema()):
            for stage in ("quantizer", "decoder") if folder.name in self.options.decoders else ("quantizer",):
                codecs[f"{folder.name} {stage}"] = optvq_codec(self.load(folder / stage)[0])
        return {"continuous": continuous_codec(self.load(self.source)[0]), **codecs, **self.fsq()}

    def fsq(self) -> dict[str, Codec]:
        """FSQ in the same model, trained on the mean squared error of the latents, then its decoder as the others'."""
        model, processor = self.load(self.folder / "transport" / "quantizer")
        config = model.config
        fsq = Fsq(config.codebook_dim, config.codebook_size, config.num_codebook_heads).to(DEVICE)
        trained = nn.ModuleList([model.post_quant_conv, model.decoder])
        self._once(fsq, "fsq_quantizer", lambda: self.train_fsq(fsq, model))
        codecs = {"fsq quantizer": self.fsq_codec(copy.deepcopy(model), fsq.eval())}
        if "fsq" not in self.options.decoders:
            return codecs
        self._once(trained, "fsq_decoder", lambda: self.train_decoder_of_fsq(trained, fsq, model, processor))
        return {**codecs, "fsq decoder": self.fsq_codec(model, fsq)}

    def _once(self, module: nn.Module, name: str, train: Callable[[], None]) -> None:
        """Trains a module, unless a file has what it became."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            train()
            save_model(module, str(path))
        load_model(module, path)

    def train_fsq(self, fsq: Fsq, model: OptVQModel) -> None:
        torch.manual_seed(0)
        optimizer = make_optimizer(fsq, 1e-2, weight_decay=0.0)
        schedule = make_schedule(optimizer, self.settings("quantizer")["max_steps"], 0.05)
        for latents in self.latent_batches(model):
            _step((fsq(latents)[0] - latents).square().mean(), optimizer, schedule)

    def train_decoder_of_fsq(
        self, trained: nn.Module, fsq: Fsq, model: OptVQModel, processor: OptVQImageProcessor
    ) -> None:
        settings = self.settings("decoder")
        model.requires_grad_(False)
        trained.requires_grad_(True)
        optimizer = make_optimizer(trained, float(settings["learning_rate"]), weight_decay=0.05)
        schedule = make_schedule(optimizer, settings["max_steps"], 0.05)
        data = replace(self.data, random_crop=True, random_flip=True)
        batches = training_batches(data, processor, settings["batch_size"])
        for pixel_values in islice(batches, settings["max_steps"]):
            pixel_values = pixel_values.to(DEVICE)
            with torch.no_grad():
                quantized, _ = fsq(model.latents_of(model.encoder_output(pixel_values)))
            difference = model._decode(quantized) - pixel_values
            _step(difference.abs().mean() + difference.square().mean(), optimizer, schedule, trained)

    @staticmethod
    def fsq_codec(model: OptVQModel, fsq: Fsq) -> Codec:
        def encode(pixel_values: torch.Tensor) -> torch.Tensor:
            return fsq(model.latents_of(model.encoder_output(pixel_values)))[1].long()

        return Codec(encode, lambda codes: model._decode(fsq.lookup(codes)), int(fsq.fsq.codebook_size))

    def latent_batches(self, model: OptVQModel) -> Any:
        """The latents of every step of the first stage: those that `optvq train` reads with the same seed."""
        tokens = load_tokens(self.latents, latents=True)
        recipe = self.recipes["quantizer"]
        for batch in islice(latent_batches(tokens, "", recipe["batch_size"]), recipe["max_steps"]):
            with torch.no_grad():
                latents = model.latents_of(batch.to(DEVICE))
            yield latents

    def steps_per_second(self) -> dict[str, float]:
        """Of the first stage, from latents and through encoder and decoder: a short run of each, one after the other."""
        recipe = self.recipe("quantizer", "_short", changes=SHORT)
        words = ("--config", recipe, "--model", self.source, "--dataset", self.options.dataset, "--eval-split", FEW)
        speeds = {}
        for name, source in (("latents", ("--latents", self.latents)), ("images", ())):
            folder = self.folder / f"short_from_{name}"
            self.run("train", *words, *source, "--output-dir", folder, "--resume", "auto")
            speeds[name] = _speed(folder, self.recipes["quantizer"]["batch_size"])
        return speeds

    @staticmethod
    def load(folder: Path) -> tuple[OptVQModel, OptVQImageProcessor]:
        return OptVQModel.from_pretrained(folder).to(DEVICE).eval(), OptVQImageProcessor.from_pretrained(folder)


def _step(loss: torch.Tensor, optimizer: Any, schedule: Any, clipped: nn.Module | None = None) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clipped is not None:
        nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def _speed(folder: Path, batch_size: int) -> float:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    # The first line has the start in it.
    return statistics.median(line["images_per_second"] for line in lines[1:]) / batch_size


def continuous_codec(model: OptVQModel) -> Codec:
    """The autoencoder without quantization: its codes say nothing, `decode` takes the latents of the latest images."""
    latest: list[torch.Tensor] = []

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        latest[:] = [model.latents_of(model.encoder_output(pixel_values))]
        return torch.zeros(len(pixel_values), 1, *latest[0].shape[2:], dtype=torch.int64)

    return Codec(encode, lambda codes: model._decode(latest[0]), 1)


def figures(evaluation: Evaluation) -> dict[str, float]:
    return {name: round(evaluation.metrics[name], 5) for name in METRICS if name in evaluation.metrics}


def draw(evaluations: dict[str, Evaluation], path: Path) -> None:
    """Test images over their reconstructions by each quantizer."""
    rows = {"original": evaluations["continuous"].originals}
    for name, evaluation in evaluations.items():
        rival, _, stage = name.partition(" ")
        what = {"quantizer": ", decoder of the autoencoder", "decoder": ", decoder trained", "": ": the autoencoder"}[
            stage
        ]
        rows[TITLES.get(rival, rival) + what] = evaluation.reconstructions
    figure = Figure(figsize=(12, 1.6 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), 1), rows.items()):
        axes.imshow(
            make_grid((images[:SHOWN].cpu() / 2 + 0.5).clamp(0, 1), nrow=SHOWN, padding=2, pad_value=1).movedim(0, -1)
        )
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_axis_off()
    figure.savefig(path, dpi=75)


def describe(results: dict[str, Any]) -> str:
    """The lengths of a benchmark, and how fast its first stage was, as a sentence."""
    of, speed = results["settings"], results["steps_per_second"]
    seconds = results["seconds"]
    return (
        f"{of['quantizer_steps']:,} steps of {of['quantizer_batch']} images for the quantizer, {of['decoder_steps']:,} of "
        f"{of['decoder_batch']} for the decoder; {of['num_heads']} heads share {of['codebook_size']:,} codes. The first stage "
        f"took {seconds['quantizer']:.0f} s, {speed['latents']:.1f} steps a second from cached latents and "
        f"{speed['images']:.2f} through encoder and decoder; the second {seconds['decoder']:.0f} s."
    )


def table(results: dict[str, Any]) -> str:
    """The figures as Markdown: of every quantizer after its own steps and, where it was trained, with its decoder."""
    titles = ("quantizer", "decoder", "PSNR, dB", "SSIM", "FD", "codes in use, %", "perplexity")
    rows = [("none: the autoencoder itself", "of the autoencoder", results["continuous"])]
    for rival in results["rivals"].values():
        rows.append((rival["title"], "of the autoencoder", rival["quantizer"]))
        rows += [(rival["title"], "trained", rival["decoder"])] if "decoder" in rival else []
    lines = [f"| {' | '.join(titles)} |", "| - " * len(titles) + "|"]
    for title, decoder, of in rows:
        places = {"psnr": 2, "ssim": 3, LITE: 2, "codebook_usage": 1, "perplexity": 0}
        cells = [f"{of[name]:.{digits}f}" if name in of else "" for name, digits in places.items()]
        lines.append(f"| {' | '.join([title, decoder, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", required=True, help="an AutoencoderKL of diffusers")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/transplant_benchmark"))
    parser.add_argument(
        "--resize", type=int, default=128, help="pixels of the shorter side; squares of it are evaluated"
    )
    parser.add_argument("--image-size", type=int, default=64, help="pixels of the crops that are trained on")
    parser.add_argument("--crops", type=int, default=1, help="random crops of every image whose latents are cached")
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--num-heads", type=int, default=2)
    parser.add_argument("--quantizer-steps", type=int, default=400)
    parser.add_argument("--quantizer-batch", type=int, default=16)
    parser.add_argument("--decoder-steps", type=int, default=100)
    parser.add_argument("--decoder-batch", type=int, default=8)
    parser.add_argument("--decoders", nargs="+", choices=TITLES, default=list(TITLES), help="whose decoder is trained")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images, as of `optvq train`")
    parser.add_argument("--max-images", type=int, help="test images to evaluate, a random sample; by default all")
    parser.add_argument("--no-distance", action="store_true", help="compute no Frechet distance, which takes longest")
    options = parser.parse_args()
    benchmark = Benchmark(options)
    codecs = benchmark.codecs()
    batches = evaluation_batches(benchmark.data, benchmark.processor(options.resize), 25, options.max_images)
    metrics = ("mse", "psnr", "ssim", *([] if options.no_distance else [LITE]))
    evaluations = evaluate_codecs(codecs, batches, metrics, SHOWN, DEVICE)
    rivals: dict[str, dict] = {name: {"title": title} for name, title in TITLES.items()}
    for name, evaluation in evaluations.items():
        rival, _, stage = name.partition(" ")
        if stage:
            rivals[rival][stage] = figures(evaluation)
    transport = benchmark.folder / "transport"
    results = {
        "settings": {name: value for name, value in vars(options).items() if type(value) is int},
        "num_images": evaluations["continuous"].metrics["num_images"],
        "images_sha256": evaluations["continuous"].images_digest,
        "steps_per_second": {name: round(value, 2) for name, value in benchmark.steps_per_second().items()},
        "seconds": {
            stage: json.loads((transport / stage / "training_summary.json").read_text())["seconds"]
            for stage in ("quantizer", "decoder")
            if (transport / stage).is_dir()
        },
        "continuous": {
            name: value for name, value in figures(evaluations["continuous"]).items() if name in METRICS[:4]
        },
        "rivals": rivals,
    }
    (benchmark.folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(evaluations, benchmark.folder / "reconstructions.png")
    print(json.dumps(results, indent=1), table(results), sep="\n")


if __name__ == "__main__":
    main()
