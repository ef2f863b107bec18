"""What the records of a model say in public."""

import pytest

from optvq_hf.publishing.public_text import public, public_text


@pytest.mark.parametrize(
    ("private", "expected"),
    [
        ("/home/alice/My Data/x", "x"),
        ("~/data/x", "x"),
        ("~alice", "~"),
        ("../../alice/data", "data"),
        (r"C:\Users\alice\run", "run"),
        ("D:/alice/run", "run"),
        (r"\\server\share\alice\run", "run"),
        ("file:///home/alice/My%20Data/x", "x"),
        ("see file:///home/alice/x now", "see x now"),
        ("cannot read /home/alice/data/2.png: broken", "cannot read 2.png: broken"),
        ("--data-dir=/home/alice/data --x ../../alice/y", "--data-dir=data --x y"),
        ("parquet:/home/alice/x.parquet", "parquet:x.parquet"),
        ("https://user:word@host.org/x?token=a#b", "https://host.org/x"),
        ("HTTPS://token@HOST/x.git", "HTTPS://HOST/x.git"),
        ("http://user:wo/rd@host/x", "http://host/x"),
        ("http://user:wo?rd@host:80/x", "http://host:80/x"),
        ("http://user:12/34@host/x", "http://host/x"),
        ("s3://key:secret@bucket/images/*.tar", "s3://bucket/images/*.tar"),
        ("https://user:word@[::1]:80/x", "https://[::1]:80/x"),
        ("user:word@host/x?token=1", "host/x"),
        ("[a](https://u:w@host/x?a=b) and (https://host/y?c=d).", "[a](https://host/x) and (https://host/y)."),
    ],
)
def test_private_parts_go(private, expected):
    assert public(private) == expected and public(expected) == expected
    assert public({"a": [{private: (private,)}], "b": 1}) == {"a": [{expected: [expected]}], "b": 1}


@pytest.mark.parametrize(
    "text",
    [
        "runs/mnist",
        "ylecun/mnist",
        "train[:10%]",
        "images/s, and/or </div> (a+b)/2 ./x/y 1 / 2 [-1, 1]",
        "https://host.org/@alice/x_(y)",
        "hf://datasets/alice/data@refs/convert",
        "mailto:alice@host.org",
        "",
    ],
)
def test_the_rest_stays(text):
    assert public(text) == text and public_text(f"a {text} b\nc") == f"a {text} b\nc"
