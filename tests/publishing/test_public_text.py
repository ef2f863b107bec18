"""What the records of a model say in public."""

import pytest

from optvq_hf.publishing.public_text import private_parts, public, public_text


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
        ("/home/alice", "~"),
        ("read /Users/alice/ again", "read ~ again"),
        (r"data\users\alice", "~"),
        (r"data\users\alice\run", "run"),
        ("data/home/alice/run", "run"),
        ("%2Fhome%2Falice%2Fx", "x"),
        ("read %252Fhome%252Falice%252Fx again", "read x again"),
        ("alice%40corp.com", ""),
        ("$HOME/alice", "alice"),
        ("${SCRATCH}/alice/x", "x"),
        (r"%USERPROFILE%\alice\x", "x"),
        ("alice@corp.com hf_" + "a1" * 17, " "),
        ("ssh alice@10.0.0.5:/data/x now", "ssh  now"),
        ("alice@gpu-node17", ""),
        ("token=hf_" + "A9" * 17, "token="),
        ("x github_pat_" + "1" * 30 + ", sk-" + "x" * 40, "x , "),
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
        "alice/data@refs",
        "hf_internal_testing_tiny_random_model",
        "home/kitchen",
        "$a/b$ and 5 %/x",
        "@article{zhang2024optvq,",
        "https://host.org/users/alice",
        "",
    ],
)
def test_the_rest_stays(text):
    assert public(text) == text and public_text(f"a {text} b\nc") == f"a {text} b\nc"


@pytest.mark.parametrize(
    ("left", "kind"),
    [
        (r'{"a": "\nhf_' + "a1" * 17 + '"}', "a token"),
        ("AKIA" + "1" * 16, "a token"),
        ("by alice@gpu-node17", "a user at a host"),
        (r'{"a": "data\\Users\\alice"}', "a home folder"),
        ("x/home/alice", "a home folder"),
        ("mailto:alice@host.org, https://host.org/home/alice, runs/mnist, 0.5", None),
    ],
)
def test_what_is_left_is_found(left, kind):
    assert private_parts(left) == kind
