"""Shows a picture, its codes, and the picture decoded from them in a web page. Needs pip install "optvq_hf[demo]".

python scripts/demo.py --model runs/quickstart
"""

import argparse
import sys
from pathlib import Path


# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from optvq_hf import OptVQImageProcessor, OptVQModel  # noqa: E402


def make_demo(model: OptVQModel, image_processor: OptVQImageProcessor):
    """Makes a function from a picture to (model input, one map of codes per head, reconstruction, description)."""

    @torch.inference_mode()
    def reconstruct(picture: Image.Image):
        pixel_values = image_processor(picture, return_tensors="pt")["pixel_values"].to(model.device)
        codes = model.encode(pixel_values).codes
        pictures = image_processor.postprocess(torch.cat([pixel_values, model.decode(codes=codes).reconstruction]))
        original, reconstruction = (image.resize((384, 384), Image.Resampling.NEAREST) for image in pictures)
        shades = (codes[0].cpu() * 255 // max(1, model.config.codebook_size - 1)).to(torch.uint8)
        maps = [Image.fromarray(head.numpy()).resize((192, 192), Image.Resampling.NEAREST) for head in shades]
        bits = codes.numel() * (model.config.codebook_size - 1).bit_length()
        rate = bits / pixel_values[0, 0].numel()
        description = f"{codes.numel()} codes, {len(codes.unique())} different, {rate:.2f} bits/pixel"
        return original, maps, reconstruction, description

    return reconstruct


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart", help="Hub id or folder (default: %(default)s)")
    source = parser.parse_args().model

    import gradio

    model, image_processor = OptVQModel.from_pretrained(source), OptVQImageProcessor.from_pretrained(source)
    outputs = [
        gradio.Image(label="input"),
        gradio.Gallery(label="codes, a map per head"),
        gradio.Image(label="decoded"),
    ]
    gradio.Interface(
        make_demo(model, image_processor),
        inputs=gradio.Image(type="pil", label="picture"),
        outputs=[*outputs, gradio.Textbox(label="codes")],
        title="OptVQ",
        flagging_mode="never",
    ).launch()


if __name__ == "__main__":
    main()
