"""Rivals of a comparison: their settings, their sizes, and what is refused."""

from pathlib import Path

import pytest

from optvq_hf.evaluation import arguments
from optvq_hf.evaluation.rivals import RIVALS, find_rival, make_rival
from optvq_hf.parsing import parse_yaml


RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


@pytest.mark.parametrize("name", ("quickstart", "mnist", "fashion_mnist", "cifar10", "small_photos"))
def test_our_default_is_that_of_the_recipes(name):
    recipe, default = parse_yaml((RECIPES / f"{name}.yaml").read_text()), RIVALS["default"]
    assert recipe["epsilon_schedule"] == list(default.epsilon) and recipe["balance_schedule"] == list(default.balance)
    fields = {
        "codebook_update": "codebook_update",
        "ema_decay": "codebook_ema_decay",
        "use_projection": "use_codebook_projection",
        "commitment_weight": "commitment_loss_weight",
    }
    assert {fields[name]: value for name, value in default.settings.items()} == {
        field: recipe[field] for field in fields.values()
    }
    assert recipe.get("codebook_learning_rate_multiplier", 1) == default.codebook_multiplier


def test_names_and_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="unknown rival 'best'; rivals are transport, "):
        arguments.ComparisonArguments(rivals=["ema", "best"])
    for name, size, message in (
        ("fsq", 1000, "levels for"),
        ("lfq", 100, "power of two"),
        ("residual", 128, "a square"),
    ):
        with pytest.raises(ValueError, match=message):
            RIVALS[name].make(size, 8)


def test_settings_of_a_rival():
    rival = find_rival("transport,epsilon=10..300,balance=1..0.1,rate=2,start=kmeans,standardised=true")
    assert rival.epsilon == (10, 300) and rival.balance == (1, 0.1) and rival.codebook_multiplier == 2
    assert rival.codebook_start == "kmeans" and rival.standardised
    assert rival.title == (
        "transport, as in the paper, epsilon 10..300, balance 1..0.1, rate 2, start kmeans, standardised"
    )
    quantizer = find_rival("transport_ema,ema_decay=0.9").make(64, 4).quantizer
    assert quantizer.ema_decay == 0.9 and quantizer.learns_by_average
    assert find_rival("transport,iterations=3,use_projection=false").make(64, 4).quantizer.iterations == 3
    assert find_rival("ema,decay=0.9").make(64, 4).module._codebook.decay == 0.9
    assert (
        find_rival("fsq,standardised=true").standardised and not find_rival("nearest,standardised=false").standardised
    )


@pytest.mark.parametrize(
    ("name", "message"),
    (
        ("transport,epsilon", "must be name=value, got 'epsilon'"),
        ("transport,epsilom=3", "unexpected keyword argument 'epsilom'"),
        ("transport,iterations=3,iterations=5", "iterations is set twice"),
        ("transport,start=other", "start must be kmeans"),
        ("transport,epsilon=1..x", "epsilon must be a finite number, got 'x'"),
        ("transport,epsilon=10..", "epsilon must be a finite number, got ''"),
        ("transport,epsilon=1..2..3", "needs two values, the first and the last, got 3"),
        ("transport,epsilon=0..100", "must be finite and greater than 0"),
        ("transport,epsilon=-1..100", "must be finite and greater than 0"),
        ("transport,balance=5..-1", r"must lie in \[0, 1\]"),
        ("transport,balance=5", "balance"),
        ("default,rate=-1", "rate must be greater than 0, got -1"),
        ("default,rate=nan", "rate must be a finite number, got 'nan'"),
        ("transport_ema,rate=2", "rate would have no effect"),
        ("nearest,epsilon=5", "epsilon would have no effect"),
        ("transport,training_assignment=nearest,epsilon=1..2,balance=0.5", "balance, epsilon would have no effect"),
        ("ema,rate=5", "rate is a setting of transport and nearest codes alone"),
        ("ema,start=kmeans", "start is a setting of transport"),
        ("fsq,epsilon=10..100", "epsilon is a setting of transport"),
        ("simvq,balance=1..0.1", "balance is a setting of transport"),
        ("fsq,standardised=True", "standardised must be true or false, got 'True'"),
        ("fsq,standardised=yes", "standardised must be true or false, got 'yes'"),
        ("fsq,normalised=1", "normalised must be true or false, got '1'"),
        ("transport,use_projection=no", "use_projection must be true or false, got 'no'"),
        ("transport,num_heads=2", "num_heads would give other tokens"),
        ("ema,heads=2", "heads would give other tokens"),
        ("ema,threshold=1", "unexpected keyword argument 'threshold'"),
    ),
)
def test_settings_of_a_rival_that_cannot_be(name, message):
    with pytest.raises(ValueError, match=f"^rival '{name}': .*{message}".replace("..", r"\.\.")):
        make_rival(name, 64, 4)


@pytest.mark.parametrize("name", RIVALS)
def test_tokens_of_a_rival(name):
    """Bits of the table are those of the quantizer."""
    rival = make_rival(name, 1024, 8)
    assert rival.num_codes**rival.num_levels == RIVALS[name].count_tokens(1024) == (1000 if name == "fsq" else 1024)
