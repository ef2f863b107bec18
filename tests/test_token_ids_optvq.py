"""Codes as the ids of one sequence, and back."""

import pytest
import torch

from builders import make_untrained, pixels, plain_config


INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.fixture(scope="module")
def model():
    return make_untrained(plain_config())  # 128 codes, 2 heads, 8 x 8 tokens


def test_the_order_is_row_by_row_and_head_by_head(model):
    codes = torch.arange(2 * 2 * 3).view(1, 2, 2, 3)
    ids = model.to_token_ids(codes, first_token_id=1000)
    assert ids.tolist() == [
        [1000 + h * 128 + int(codes[0, h, y, x]) for y in range(2) for x in range(3) for h in range(2)]
    ]
    assert torch.equal(model.from_token_ids(ids, 1000, grid=(2, 3)), codes)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype(model, dtype):
    codes = torch.randint(0, 128, (2, 2, 8, 8))
    codes[0, 0, 0, 0] = 127  # the largest of int8
    ids = model.to_token_ids(codes.to(dtype))
    assert ids.dtype == torch.int64 and torch.equal(ids, model.to_token_ids(codes))
    assert torch.equal(model.decode(codes=codes.to(dtype)).reconstruction, model.decode(codes=codes).reconstruction)
    if torch.iinfo(dtype).max >= 255:
        assert torch.equal(model.from_token_ids(ids.to(dtype)), codes)


def test_large_codebooks_as_uint16():
    model = make_untrained(plain_config(codebook_size=65536, codebook_dim=2, num_codebook_heads=1))
    codes = torch.tensor([0, 40000, 65535]).view(1, 1, 1, 3).to(torch.uint16)
    assert model.to_token_ids(codes).tolist() == [[0, 40000, 65535]]
    assert model.from_token_ids(torch.tensor([[65535]]).to(torch.uint16), grid=(1, 1)).tolist() == [[[[65535]]]]


CODES = torch.zeros(1, 2, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        (CODES[0], ValueError, r"codes must be \(B, 2, H, W\), 2 for each token, got \(2, 8, 8\)"),
        (CODES[:, :1], ValueError, r"got \(1, 1, 8, 8\)"),
        (CODES.movedim(1, -1), ValueError, r"got \(1, 8, 8, 2\)"),
        (CODES.float(), ValueError, "codes must be integers, got torch.float32"),
        (CODES.bool(), ValueError, "codes must be integers, got torch.bool"),
        (CODES + 128, IndexError, r"codes must lie in \[0, 128\), got values from 128 to 128"),
        (CODES - 1, IndexError, "from -1 to -1"),
        (torch.full((1, 2, 8, 8), 2**63, dtype=torch.uint64), IndexError, "got values from"),
        (CODES.tolist(), TypeError, "codes must be a tensor, got list"),
    ],
)
def test_wrong_codes(model, codes, error, message):
    with pytest.raises(error, match=message):
        model.to_token_ids(codes)


IDS = torch.tensor([0, 128]).repeat(1, 64)


def with_id(position, value):
    ids = IDS.clone()
    ids[0, position] = value
    return ids


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS.float(), {}, "token_ids must be integers, got torch.float32"),
        (IDS + 0.7, {}, "token_ids must be integers"),
        (IDS > 0, {}, "token_ids must be integers, got torch.bool"),
        (IDS[0], {}, r"token_ids must be \(B, 128\), 8 x 8 tokens of 2 codes, got \(128,\)"),
        (IDS[:, 1:], {}, r"got \(1, 127\)"),
        (
            with_id(5, 7),
            {},
            r"token_ids\[0, 5\] is 7, but position 5 is for code 1 of its token, whose ids are 128 to 255",
        ),
        (
            with_id(4, 128),
            {},
            r"token_ids\[0, 4\] is 128, but position 4 is for code 0 of its token, whose ids are 0 to 127",
        ),
        (with_id(127, -1), {}, r"token_ids\[0, 127\] is -1, but position 127 is for code 1 of its token"),
        (
            IDS,
            {"first_token_id": 10},
            r"token_ids\[0, 0\] is 0, but position 0 is for code 0 of its token, whose ids are 10 to 137",
        ),
        (torch.cat([IDS, with_id(3, 300)]), {}, r"token_ids\[1, 3\] is 300"),
        (torch.full((1, 128), 2**63, dtype=torch.uint64), {}, r"token_ids\[0, 0\] is 9223372036854775808, but"),
        (IDS, {"first_token_id": -1}, "first_token_id must be an integer, 0 or greater, got -1"),
        (IDS, {"first_token_id": 2**63 - 1}, "first_token_id is too large"),
        (IDS, {"first_token_id": 2**64}, "first_token_id is too large"),
        (IDS, {"grid": (True, 64)}, r"grid must be height and width in tokens, got \(True, 64\)"),
        (IDS, {"first_token_id": 1.5}, "first_token_id must be an integer, 0 or greater, got 1.5"),
        (IDS, {"grid": (0, 8)}, "0 x 8 tokens"),
        (IDS, {"grid": (-8, -8)}, "-8 x -8 tokens"),
        (IDS, {"grid": (4, 8)}, r"token_ids must be \(B, 64\)"),
        (IDS, {"grid": 8}, "grid must be height and width in tokens, got 8"),
        (IDS, {"grid": (8.0, 8)}, r"grid must be height and width in tokens, got \(8.0, 8\)"),
    ],
)
def test_wrong_ids(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        model.from_token_ids(ids, **options)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_names_of_emu3_and_janus(heads):
    model = make_untrained(plain_config(num_codebook_heads=heads))
    images = pixels(2, 3, 16, 24)
    codes = model.encode(images).codes
    tokens = model.get_image_tokens(images)
    assert torch.equal(tokens, model.to_token_ids(codes))
    if heads == 1:
        assert torch.equal(tokens, codes.flatten(1))  # row by row
    assert torch.equal(model.decode_image_tokens(tokens, height=4, width=6), model.decode(codes=codes).reconstruction)
    with pytest.raises(ValueError, match="8 x 8 tokens"):
        model.decode_image_tokens(tokens, height=8, width=8)
    assert not model.decode_image_tokens(tokens, 4, 6).requires_grad
