"""Code speech at 1.6 kbit/s with residual OptVQ, and listen to what is left of it.

    pip install "optvq_hf[train]"
    apt-get install asterisk-core-sounds-en-wav asterisk-core-sounds-es-wav asterisk-core-sounds-fr-wav
    python scripts/examples/speech_codes.py --audio /usr/share/asterisk/sounds

Any folder of WAV files will do. Clips become frames of a log-mel spectrogram, padded to batches (B, T, channels) with a mask
of real frames. A small codec learns: convolutions, a quantizer with levels of codes, convolutions back. A tenth of the
recordings is held out; of some of these, original and reconstruction are written as WAV files (phases by Griffin-Lim) and as a
picture.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rival_quantizers import add_flags, earlier_runs, list_runs, make_quantizer, save_run, start_codes, table, usage
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.audio_utils import mel_filter_bank


COLUMNS = {
    "usage_percent": "usage of each level, %",
    "distance_db": "log-spectral distance, dB",
    "unquantized_db": "the same without quantizer",
    "resynthesis_db": "of the WAV files",
}
DB = 10 / np.log(10)  # decibels of a natural logarithm of a power


class Mel:
    """Waveforms to frames of log-mel power, and back.

    Args:
        sampling_rate: In Hz.
        channels: Mel channels C.
    """

    def __init__(self, sampling_rate: int, channels: int = 64):
        self.sampling_rate, self.channels = sampling_rate, channels
        self.hop = sampling_rate // 100
        self.size = 2 ** (3 * self.hop).bit_length()
        bins = self.size // 2 + 1
        bank = mel_filter_bank(bins, channels, 0.0, sampling_rate / 2, sampling_rate, norm="slaney", mel_scale="slaney")
        self.bank = torch.from_numpy(bank).float()  # (bins, C)
        self.window = torch.hann_window(self.size)

    def _stft(self, wave: Tensor) -> Tensor:
        return torch.stft(wave, self.size, self.hop, window=self.window, return_complex=True, pad_mode="constant")

    def frames(self, wave: Tensor) -> Tensor:
        """Samples (N,) in [-1, 1] to natural logarithms (T, C), at least those of -90 dB."""
        return (self._stft(wave).abs().square().T @ self.bank).clamp(min=1e-9).log()

    def wave(self, frames: Tensor, iterations: int = 60) -> Tensor:
        """Frames (T, C) to samples, with phases by the fast Griffin-Lim algorithm (Perraudin et al. 2013)."""
        mel = frames.exp().T
        power = (torch.linalg.pinv(self.bank.T) @ mel).clamp(min=1e-9)
        for _ in range(100):  # towards the nonnegative power whose mel channels are these
            power = power * (self.bank @ (mel / (self.bank.T @ power))) / self.bank.sum(1, keepdim=True).clamp(min=1e-9)
        magnitude, length = power.sqrt(), (frames.shape[0] - 1) * self.hop
        generator = torch.Generator().manual_seed(0)
        angles = torch.rand(magnitude.shape, generator=generator) * 2 * torch.pi
        phases, earlier = torch.polar(torch.ones_like(magnitude), angles), torch.zeros(())
        for _ in range(iterations):
            consistent = self._stft(self._istft(magnitude * phases, length))
            accelerated = consistent + 0.99 * (consistent - earlier)
            phases, earlier = accelerated / accelerated.abs().clamp(min=1e-9), consistent
        return self._istft(magnitude * phases, length)

    def _istft(self, spectrum: Tensor, length: int) -> Tensor:
        return torch.istft(spectrum, self.size, self.hop, window=self.window, length=length)


class SpeechCodec(nn.Module):
    """Frames (B, T, channels) to codes (B, ceil(T / 2), levels) and back. Padding changes no real frame."""

    def __init__(self, channels: int, quantizer: nn.Module, dim: int = 32, width: int = 48):
        super().__init__()
        self.encoder = nn.ModuleList(
            [
                nn.Conv1d(channels, width, 5, padding=2),
                nn.Conv1d(width, width, 4, 2, 1),
                nn.Conv1d(width, dim, 3, padding=1),
            ]
        )
        self.decoder = nn.ModuleList(
            [
                nn.Conv1d(dim, 2 * width, 3, padding=1),
                nn.Conv1d(width, width, 5, padding=2),
                nn.Conv1d(width, channels, 5, padding=2),
            ]
        )
        self.quantizer = quantizer

    def encode(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, ceil(T / 2), dim) and which of them are real."""
        if frames.shape[1] % 2:
            frames, mask = F.pad(frames, (0, 0, 0, 1)), F.pad(mask, (0, 1))
        halved = mask.unflatten(1, (-1, 2)).any(2)
        first, second, last = self.encoder
        hidden = F.gelu(first((frames * mask[..., None]).mT)) * mask[:, None]
        hidden = F.gelu(second(hidden)) * halved[:, None]
        return last(hidden).mT, halved

    def decode(self, quantized: Tensor, mask: Tensor) -> Tensor:
        """Frames (B, T, channels)."""
        first, second, last = self.decoder
        hidden = F.gelu(first(quantized.mT)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2).flatten(2)
        hidden = hidden[..., : mask.shape[1]] * mask[:, None]
        hidden = (hidden + F.gelu(second(hidden))) * mask[:, None]
        return last(hidden).mT

    def forward(self, frames: Tensor, mask: Tensor, quantize: bool = True) -> tuple[Tensor, Tensor | None, Tensor]:
        """Reconstruction, codes (-1 where there is padding), and the quantizer's loss."""
        features, halved = self.encode(frames, mask)
        if not quantize:
            return self.decode(features * halved[..., None], mask), None, features.new_zeros(())
        output = self.quantizer(features, mask=halved)
        return self.decode(output.quantized, mask), output.codes, output.loss


class Speech:
    """Clips of recordings as normalized frames: those to learn from, and those held out.

    Args:
        folder: Of WAV files, at any depth.
        mel: Makes frames.
        seconds: Longest clip; longer recordings are cut.

    Raises:
        SystemExit: If there are too few recordings to learn from some and test others.
    """

    def __init__(self, folder: Path, mel: Mel, seconds: float = 2.0):
        self.mel, self.train, self.test = mel, [], []
        longest = int(100 * seconds)
        paths = sorted(folder.rglob("*.wav"))
        held_out = set(sorted({path.name for path in paths})[::10])  # a sentence of several speakers has one name
        for path in paths:
            clips = mel.frames(read_wave(path, mel.sampling_rate)).split(longest)
            (self.test if path.name in held_out else self.train).extend(clip for clip in clips if len(clip) > 10)
        if not self.train or not self.test:
            raise SystemExit(
                f"{folder} has {len(self.train)} clips to learn from and {len(self.test)} to test, of *.wav"
            )
        together = torch.cat(self.train)
        self.mean, self.deviation = together.mean(0), together.std(0)
        self.train, self.test = ([self.normalize(clip) for clip in clips] for clips in (self.train, self.test))

    def normalize(self, frames: Tensor) -> Tensor:
        return (frames - self.mean) / self.deviation

    def restore(self, frames: Tensor) -> Tensor:
        return frames * self.deviation + self.mean

    def distance(self, frames: Tensor, others: Tensor) -> Tensor:
        """Log-spectral distance of normalized frames (..., C) in dB: root mean square over channels, (...)."""
        return DB * ((frames - others) * self.deviation).square().mean(-1).sqrt()


def read_wave(path: Path, sampling_rate: int) -> Tensor:
    """Samples (N,) in [-1, 1], of all channels together."""
    rate, samples = wavfile.read(path)
    if samples.dtype.kind in "iu":
        middle, scale = (128, 128) if samples.dtype == np.uint8 else (0, -float(np.iinfo(samples.dtype).min))
        samples = (samples.astype(np.float64) - middle) / scale
    if samples.ndim == 2:
        samples = samples.mean(1)
    if rate != sampling_rate:
        divisor = np.gcd(rate, sampling_rate)
        samples = resample_poly(samples, sampling_rate // divisor, rate // divisor)
    return torch.from_numpy(np.asarray(samples, dtype=np.float32))


def pad(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips (T, C) to a batch (B, T, C) and the mask (B, T) of real frames."""
    lengths = torch.tensor([len(clip) for clip in clips])
    frames = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    return frames, torch.arange(frames.shape[1]) < lengths[:, None]


def train(rival: str, start: str, seed: int, speech: Speech, arguments: argparse.Namespace) -> SpeechCodec:
    """Trains a codec; batches are the same for all rivals."""
    torch.manual_seed(seed)
    codec = SpeechCodec(speech.mel.channels, make_quantizer(rival, arguments.levels, arguments.codebook_size, dim=32))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(codec.parameters(), arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.95 * step / arguments.max_steps)
    unquantized = (
        arguments.max_steps // 10
    )  # the first steps train the convolutions alone, so that there is something to start from
    for step in tqdm(range(arguments.max_steps), desc=f"{rival}, {start}, seed {seed}", disable=None):
        chosen = torch.randint(len(speech.train), (arguments.batch_size,), generator=generator)
        frames, mask = pad([speech.train[index] for index in chosen])
        if step == unquantized:
            clips = pad(speech.train[:: max(1, len(speech.train) // 200)])
            with torch.no_grad():
                features, real = codec.encode(*clips)
            start_codes(codec.quantizer, start, features[real], int(mask.sum()) // 2, seed)
        reconstruction, _, loss = codec(frames, mask, quantize=step >= unquantized)
        errors = (reconstruction - frames)[mask]
        (errors.abs().mean() + errors.square().mean() + loss).backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return codec.eval()


@torch.no_grad()
def evaluate(codec: SpeechCodec, speech: Speech, codebook_size: int) -> dict:
    """Of the held-out clips: usage of every level and the log-spectral distance, also without the quantizer."""
    all_codes, distances = [], {True: [], False: []}
    for first in range(0, len(speech.test), 32):
        frames, mask = pad(speech.test[first : first + 32])
        for quantize, of_all in distances.items():
            reconstruction, codes, _ = codec(frames, mask, quantize)
            of_all.append(speech.distance(reconstruction, frames)[mask])
            if codes is not None:
                all_codes.append(codes[codec.encode(frames, mask)[1]])
    return {
        "usage_percent": usage(torch.cat(all_codes), codebook_size),
        "distance_db": torch.cat(distances[True]).mean().item(),
        "unquantized_db": torch.cat(distances[False]).mean().item(),
    }


@torch.no_grad()
def listen(codec: SpeechCodec, speech: Speech, number: int) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """Held-out clips and their reconstructions as samples, and the mean log-spectral distance of the latter, from these."""
    pairs, distances = [], []
    for clip in sorted(speech.test, key=len, reverse=True)[:: max(1, len(speech.test) // (2 * number))][:number]:
        frames, mask = pad([clip])
        waves = [speech.mel.wave(speech.restore(part)) for part in (clip, codec(frames, mask)[0][0])]
        again = speech.normalize(speech.mel.frames(waves[1]))
        distances.append(speech.distance(again, clip).mean().item())
        pairs.append((waves[0], waves[1]))
    return pairs, sum(distances) / len(distances)


def save(pairs: list[tuple[Tensor, Tensor]], mel: Mel, folder: Path) -> None:
    """Writes originals and reconstructions as WAV files, and the spectrograms of the first three as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pair in enumerate(pairs):
        for name, wave in zip(("original", "reconstruction"), pair):
            samples = (wave.clamp(-1, 1) * 32767).round().to(torch.int16)
            wavfile.write(folder / f"{number}-{name}.wav", mel.sampling_rate, samples.numpy())
    shown = pairs[:3]
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(2, len(shown), sharey=True, squeeze=False)
    for column, pair in enumerate(shown):
        for row, (name, wave) in enumerate(zip(("original", "reconstruction"), pair)):
            extent = (0, len(wave) / mel.sampling_rate, 0, mel.channels)
            levels = DB * mel.frames(wave).T
            picture = axes[row, column].imshow(levels, vmin=-80, vmax=0, origin="lower", aspect="auto", extent=extent)
            axes[row, column].set_title(name)
    figure.supxlabel("seconds")
    figure.supylabel("mel channel")
    figure.colorbar(picture, ax=axes, label="dB")
    figure.savefig(folder / "spectrograms.png", dpi=80)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add_flags(parser, "runs/speech", levels=4, max_steps=250, learning_rate=5e-3)
    parser.add_argument("--audio", required=True, type=Path, help="Folder of WAV files, at any depth")
    parser.add_argument("--sampling-rate", default=8000, type=int, help="In Hz; other files are resampled")
    parser.add_argument("--batch-size", default=16, type=int, help="Clips per step")
    parser.add_argument("--samples", default=3, type=int, help="Held-out clips to write as WAV files")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    arguments = make_parser().parse_args(argv)
    runs = earlier_runs(arguments)
    speech = Speech(arguments.audio, Mel(arguments.sampling_rate))
    frames = sum(map(len, speech.train)), sum(map(len, speech.test))
    bits = 50 * arguments.levels * np.log2(arguments.codebook_size)
    print(f"{frames[0] / 6000:.1f} minutes to learn from, {frames[1] / 6000:.1f} held out; {bits:.0f} bit/s")
    for seed, rival, start in list_runs(arguments, runs):
        codec = train(rival, start, seed, speech, arguments)
        pairs, distance = listen(codec, speech, arguments.samples)
        save(pairs, speech.mel, arguments.output_dir / f"{rival}-{start}-{seed}")
        measured = evaluate(codec, speech, arguments.codebook_size) | {"resynthesis_db": distance}
        run = {"rival": rival, "start": start, "seed": seed, **measured}
        save_run(arguments, runs, run, minutes=[frames[0] / 6000, frames[1] / 6000])
    print(table(runs, COLUMNS))
    return runs


if __name__ == "__main__":
    main()
