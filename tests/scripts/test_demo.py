import runpy
from pathlib import Path

from PIL import Image

from optvq_hf import OptVQImageProcessor


def test_a_picture_its_codes_and_its_reconstruction(trained_folder, trained_model):
    demo = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "demo.py"))
    reconstruct = demo["make_demo"](trained_model, OptVQImageProcessor.from_pretrained(trained_folder))
    original, maps, reconstruction, description = reconstruct(Image.new("RGB", (60, 50), (200, 30, 30)))
    assert original.size == reconstruction.size == (384, 384) and len(maps) == 4
    assert description.startswith("256 codes, ") and description.endswith("2.50 bits/pixel")
