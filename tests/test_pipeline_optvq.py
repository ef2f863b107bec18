import base64
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import pipeline

from builders import plain_config, spread
from optvq_hf import ImageReconstructionPipeline, ImageTokenizationPipeline, OptVQImageProcessor, OptVQModel
from optvq_hf.training.models import make_image_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = plain_config()
    spread(OptVQModel(config).eval()).save_pretrained(path)
    make_image_processor(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenize(folder):
    return pipeline("image-tokenization", model=str(folder))


@pytest.fixture(scope="module")
def reconstruct(folder):
    return pipeline("image-reconstruction", model=str(folder))


@pytest.fixture(scope="module")
def pictures():
    """Five that differ, also upside down."""
    noise = [Image.effect_noise((36 + number, 40), 60 + number) for number in range(5)]
    return [Image.merge("RGB", (one, one.rotate(90).resize(one.size), ImageOps.invert(one))) for one in noise]


@pytest.fixture(scope="module")
def codes(folder, pictures):
    """What the model itself says."""
    model, image_processor = OptVQModel.from_pretrained(folder), OptVQImageProcessor.from_pretrained(folder)
    codes = model.encode(image_processor(pictures, return_tensors="pt").pixel_values).codes
    assert codes.unique().numel() > 50 and len({one.numpy().tobytes() for one in codes}) == 5
    return list(codes)


def are(results, codes):
    results = list(results)
    return len(results) == len(codes) and all(torch.equal(one["codes"], other) for one, other in zip(results, codes))


# ---- tokenization ----------------------------------------------------------------------------------------------------


def test_one_picture_and_many(tokenize, pictures, codes):
    assert isinstance(tokenize, ImageTokenizationPipeline)
    result = tokenize(pictures[0])
    assert result.keys() == {"codes"} and result["codes"].dtype == torch.int64 and result["codes"].shape == (2, 8, 8)
    assert torch.equal(result["codes"], codes[0])
    assert tokenize([]) == []
    for batch_size in (1, 2, 5, 64):
        assert are(tokenize(pictures, batch_size=batch_size), codes)
    assert are(tokenize(tuple(pictures)), codes)
    assert are(tokenize((picture for picture in pictures), batch_size=2), codes)


def test_paths_urls_arrays_and_bytes(tokenize, pictures, codes, serve, tmp_path):
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    in_memory = path.read_bytes()
    assert are(map(tokenize, (path, str(path), np.array(pictures[0]))), codes[:1] * 3)
    assert are([tokenize("data:image/png;base64," + base64.b64encode(in_memory).decode())], codes[:1])
    held = ({"bytes": in_memory, "path": None}, io.BytesIO(in_memory), in_memory, torch.tensor(np.array(pictures[0])))
    assert are(map(tokenize, held), codes[:1] * 4)
    assert are([tokenize(serve(in_memory))], codes[:1])


def test_arrays(tokenize, pictures, codes):
    array = np.array(pictures[0])
    assert are(tokenize(array[None]), codes[:1])  # a batch gives a list
    batch = np.stack([np.array(picture.resize((40, 40))) for picture in pictures])
    expected = [result["codes"] for result in tokenize(list(batch))]
    for same in (batch, torch.tensor(batch).movedim(-1, 1)):
        assert are(tokenize(same, batch_size=2), expected)
    grey = tokenize(array[..., 0])["codes"]
    assert torch.equal(grey, tokenize(Image.fromarray(array[..., 0]))["codes"])


def test_the_camera_may_be_turned(tokenize, pictures, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    pictures[0].rotate(180).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(tokenize(tmp_path / "turned.png")["codes"], tokenize(pictures[0])["codes"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_datasets(tokenize, pictures, codes, batch_size):
    columns = {"name": list("abcde"), "picture": pictures}
    dataset = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    undecoded = dataset.cast_column("picture", datasets.Image(decode=False))
    for images in (dataset, undecoded, dataset.to_iterable_dataset(), dataset["picture"], undecoded["picture"]):
        assert are(tokenize(images, batch_size=batch_size), codes)
    assert len(tokenize(dataset)) == len(tokenize(dataset, batch_size=batch_size)) == 5  # a progress bar can tell
    assert list(tokenize(dataset.select([]))) == []
    renamed = dataset.with_transform(lambda rows: {"pixels": rows["picture"]})
    assert are(tokenize(renamed, image_column="pixels", batch_size=batch_size), codes)
    both = datasets.Dataset.from_dict({"picture": pictures, "other": pictures[::-1]})
    both = both.cast_column("picture", datasets.Image()).cast_column("other", datasets.Image())
    assert are(tokenize(both, image_column="other", batch_size=batch_size), codes[::-1])


def test_lists_and_datasets_are_batched_by_themselves(tokenize, pictures, codes, monkeypatch):
    sizes = []
    encode = tokenize.model.encode
    monkeypatch.setattr(
        tokenize.model,
        "encode",
        lambda pixel_values, **options: (sizes.append(len(pixel_values)), encode(pixel_values, **options))[1],
    )
    dataset = datasets.Dataset.from_dict({"picture": pictures}).cast_column("picture", datasets.Image())
    for images in (pictures * 7, dataset, dataset["picture"]):
        results = list(tokenize(images))
        assert are(results, codes * (len(results) // 5))
    assert sizes == [32, 3, 5, 5]
    sizes.clear()
    tokenize(pictures, assignment="sinkhorn")  # a batch would change the codes
    monkeypatch.setattr(tokenize.image_processor, "do_center_crop", False)
    tokenize(
        [picture.resize((32, 32 + 4 * number)) for number, picture in enumerate(pictures)]
    )  # no batch of different sizes
    assert sizes == [1] * 10


def test_streams_are_read_as_they_go(tokenize, pictures):
    read = []

    def rows():
        for number, picture in enumerate(pictures):
            read.append(number)
            yield {"picture": picture}

    stream = datasets.IterableDataset.from_generator(rows)
    results = iter(tokenize(stream, image_column="picture"))
    next(results)
    assert len(read) < 5


def test_ids_for_a_language_model(tokenize, pictures, codes):
    result = tokenize(pictures[0], return_token_ids=True, first_token_id=1000)
    ids = result["token_ids"]
    assert ids.dtype == torch.int64 and ids.shape == (8 * 8 * 2,)
    assert ids[:4].tolist() == [
        1000 + codes[0][0, 0, 0],
        1000 + 128 + codes[0][1, 0, 0],
        1000 + codes[0][0, 0, 1],
        1000 + 128 + codes[0][1, 0, 1],
    ]
    model = tokenize.model
    assert torch.equal(model.from_token_ids(ids[None], 1000)[0], codes[0])
    wide = torch.randint(0, 128, (3, 2, 4, 6))
    assert torch.equal(model.from_token_ids(model.to_token_ids(wide), grid=(4, 6)), wide)
    with pytest.raises(ValueError, match=r"token_ids must be \(B, 128\), 8 x 8 tokens of 2 codes, got \(1, 127\)"):
        model.from_token_ids(ids[None, 1:], 1000)
    with pytest.raises(ValueError, match=r"token_ids\[0, 0\] is 1204, but position 0 is for code 0 of its token"):
        model.from_token_ids(ids[None].flip(1), 1000)
    again = pipeline("image-tokenization", model=model, image_processor=tokenize.image_processor, return_token_ids=True)
    assert torch.equal(again(pictures[0])["token_ids"], ids - 1000)


def test_assignments(tokenize, pictures):
    default, nearest = tokenize(pictures, batch_size=5), tokenize(pictures, batch_size=5, assignment="nearest")
    balanced = tokenize(pictures, batch_size=5, assignment="sinkhorn")
    assert are(nearest, [result["codes"] for result in default])
    assert not are(balanced, [result["codes"] for result in default])
    with pytest.raises(ValueError, match="assignment must be one of"):
        tokenize(pictures[0], assignment="closest")
    with pytest.raises(TypeError, match="assignement"):
        tokenize(pictures[0], assignement="nearest")


def test_what_is_no_picture(tokenize, pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no picture nothing\.png"):
        tokenize("nothing.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"cannot read image .*text\.png: not an image file"):
        tokenize(tmp_path / "text.png")
    for wrong, name in ((None, "NoneType"), (3, "int"), ([pictures[:2], pictures[2:]], "list"), ({"image": 1}, "dict")):
        with pytest.raises(ValueError, match=f"expected a picture: .* got {name}"):
            tokenize(wrong)
    array = np.array(pictures[0])
    for wrong in (array / 255, torch.tensor(array).float(), array.astype(np.uint16)):
        with pytest.raises(ValueError, match="must be uint8"):
            tokenize(wrong)
    for wrong in (np.zeros((28, 28, 28), np.uint8), [array[None]]):
        with pytest.raises(ValueError, match="is not that of one picture"):
            tokenize(wrong)
    dataset = datasets.Dataset.from_dict({"a": pictures, "b": pictures, "c": list("abcde")})
    dataset = dataset.cast_column("a", datasets.Image()).cast_column("b", datasets.Image())
    with pytest.raises(ValueError, match="2 columns known to hold images: pass image_column"):
        tokenize(dataset)
    for images in (dataset, datasets.IterableDataset.from_generator(lambda: iter([{"a": 1, "b": 1, "c": 1}]))):
        with pytest.raises(ValueError, match="no column 'd'; its columns are a, b, c"):
            list(tokenize(images, image_column="d"))
    with pytest.raises(ValueError, match="the dataset has splits: pass one of train, test"):
        tokenize(datasets.DatasetDict(train=dataset, test=dataset))


# ---- reconstruction --------------------------------------------------------------------------------------------------


def test_reconstructions(reconstruct, folder, pictures, codes):
    assert isinstance(reconstruct, ImageReconstructionPipeline)
    model, image_processor = OptVQModel.from_pretrained(folder), OptVQImageProcessor.from_pretrained(folder)
    expected = image_processor.postprocess(model.decode(codes=torch.stack(codes)).reconstruction)
    results = reconstruct(pictures, batch_size=2)
    assert [result.keys() for result in results] == [{"image"}] * 5
    for result, picture in zip(results, expected, strict=True):  # batches are rounded otherwise: by one level at most
        assert np.abs(np.asarray(result["image"], int) - np.asarray(picture, int)).max() <= 1
    assert results[0]["image"].size == (32, 32) and results[0]["image"].mode == "RGB"


def test_metrics_of_reconstructions(reconstruct, pictures):
    [result, _] = reconstruct(pictures[:2], return_metrics=True, batch_size=2)
    pixel_values = reconstruct.image_processor(pictures[0], return_tensors="pt").pixel_values
    reconstruction = reconstruct.model(pixel_values).reconstruction.clamp(-1, 1)
    assert result["metrics"]["mse"] == pytest.approx((reconstruction - pixel_values).square().mean().item(), rel=1e-4)
    mse = ((reconstruction - pixel_values) / 2).square().mean()
    assert result["metrics"]["psnr"] == pytest.approx(-10 * mse.log10().item(), rel=1e-4)
    perfect = {"reconstruction": pixel_values, "pixel_values": pixel_values}
    assert reconstruct.postprocess(perfect, return_metrics=True)["metrics"] == {"mse": 0, "psnr": 100}


def test_one_channel(tmp_path, pictures):
    config = plain_config(num_channels=1)
    OptVQModel(config).save_pretrained(tmp_path)
    make_image_processor(config).save_pretrained(tmp_path)
    assert pipeline("image-reconstruction", model=str(tmp_path))(pictures[0])["image"].mode == "L"


# ---- pictures of any size --------------------------------------------------------------------------------------------


def test_pictures_keep_their_size(tokenize, reconstruct, pictures):
    sizes = [(36 + number, 40) for number in range(5)]
    assert [picture.size for picture in pictures] == sizes
    results = tokenize(pictures, keep_size=True)
    assert [result["codes"].shape for result in results] == [(2, 10, 9), *[(2, 10, 10)] * 4]
    assert [result["original_size"] for result in results] == [(40, width) for width, _ in sizes]
    rebuilt = reconstruct(pictures, keep_size=True, return_metrics=True)
    assert [result["image"].size for result in rebuilt] == sizes
    assert [result["original_size"] for result in rebuilt] == [(40, width) for width, _ in sizes]
    processor, model = reconstruct.image_processor, reconstruct.model
    for picture, result, again in zip(pictures, results, rebuilt):
        reconstruction = model.decode(codes=result["codes"][None]).reconstruction
        [image] = processor.postprocess(reconstruction, [result["original_size"]])
        assert np.abs(np.asarray(image, int) - np.asarray(again["image"], int)).max() <= 1
        error = reconstruction[0, :, :40, : picture.width].clamp(-1, 1).movedim(0, -1)
        mse = (error - torch.tensor(np.array(picture)) / 127.5 + 1).square().mean()
        assert again["metrics"]["mse"] == pytest.approx(mse.item(), rel=1e-4)
    assert "original_size" not in tokenize(pictures[0])
    batch = tokenize(pictures[1:], keep_size=True, batch_size=4)  # padded, all have one size
    assert [result["original_size"] for result in batch] == [(40, width) for width, _ in sizes[1:]]
    assert are(batch, [result["codes"] for result in results[1:]])
    for several in (pictures, (picture for picture in pictures)):
        with pytest.raises(ValueError, match="pictures of different sizes make no batch: pass batch_size=1, or crop"):
            list(tokenize(several, keep_size=True, batch_size=2))


def test_pictures_in_tiles(tokenize, reconstruct, pictures, folder):
    large = pictures[0].resize((150, 110))
    whole, tiled = tokenize(large, keep_size=True), tokenize(large, keep_size=True, tile_size=40)
    assert whole["codes"].shape == (2, 28, 38) and torch.equal(tiled["codes"], whole["codes"])
    images = [reconstruct(large, keep_size=True, **options)["image"] for options in ({}, {"tile_size": 40})]
    assert images[0].size == (150, 110) and images[0].tobytes() == images[1].tobytes()
    of_tiles = pipeline("image-tokenization", model=str(folder), keep_size=True, tile_size=2)
    with pytest.raises(ValueError, match="tile_size must be .* at least the downsampling factor 4, got 2"):
        of_tiles([large, large])


# ---- transformers' own -----------------------------------------------------------------------------------------------


def test_the_built_in_pipeline(folder, pictures, monkeypatch):
    def ask(question):
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)  # whether to run the folder's code, while the package's is there
    extract = pipeline("image-feature-extraction", model=str(folder))
    model, image_processor = OptVQModel.from_pretrained(folder), OptVQImageProcessor.from_pretrained(folder)
    quantized = model.encode(image_processor(pictures, return_tensors="pt").pixel_values).quantized
    features = extract(pictures[0], return_tensors=True)
    assert torch.equal(features, quantized[:1])
    assert torch.equal(torch.tensor(extract(pictures, batch_size=2)[4]), quantized[4:])


def test_a_saved_pipeline_carries_its_code(reconstruct, pictures, tmp_path):
    reconstruct.save_pretrained(tmp_path)
    again = pipeline(model=str(tmp_path), trust_remote_code=True)
    assert again(pictures[0])["image"].tobytes() == reconstruct(pictures[0])["image"].tobytes()


def test_half_precision(folder, pictures):
    assert pipeline("image-reconstruction", model=str(folder), dtype="bfloat16")(pictures[0])["image"].size == (32, 32)
