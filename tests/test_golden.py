"""Against inputs and outputs of the original implementation.

Its guards (+ 1e-8) move some codes even where the plan is clear, so codes are judged by the exact float64 iteration, at least
94 % of them must agree with the original, and values that depend on codes are compared with the original's codes fed in.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures.golden import GOLDEN, SUBSET
from golden.cut import cut
from optvq_hf import OptVQQuantizer, quantizer_optvq
from optvq_hf.publishing.conversion import NORMALIZATIONS, convert_name
from optvq_hf.sinkhorn import sinkhorn_assign, sinkhorn_plan
from reference import PAPER, exact_iteration, load_reference_model, margins, quantizer_arguments


VALUES = {"rtol": 1e-4, "atol": 1e-5}
GRADIENTS = {"rtol": 1e-3, "atol": 1e-5}


def close(actual, expected, **tolerances):
    torch.testing.assert_close(actual.reshape(expected.shape), expected, **tolerances)


# ---- sinkhorn --------------------------------------------------------------------------------------------------------


def test_every_stored_plan(golden, count_golden):
    """Finite, normalised, and equal to the exact float64 iteration, also where the original fails."""
    index, tensors = json.loads((golden / "sinkhorn.json").read_text()), load_file(golden / "sinkhorn.safetensors")
    checked = failures_of_the_original = refused = 0
    for case in index:
        cost = tensors[case["cost"]]
        for output in case["outputs"]:
            arguments = {
                "epsilon": output["epsilon"],
                "iterations": output["n_iters"],
                "normalization": NORMALIZATIONS[output["normalize_mode"]],
                "dim": case["dim"],
            }
            if not cost.isfinite().all():
                with pytest.raises(ValueError, match="NaN or inf in cost"):  # 3 outputs, of one cost
                    sinkhorn_plan(cost, **arguments)
                refused += 1
                continue
            plan = sinkhorn_plan(cost, **arguments)
            assert plan.isfinite().all(), output["id"]
            torch.testing.assert_close(plan.sum(1), torch.ones(len(plan)), msg=output["id"])
            plan64 = sinkhorn_plan(cost.double(), **arguments)
            exact = exact_iteration(cost, **arguments).softmax(1)
            torch.testing.assert_close(plan64, exact, rtol=1e-6, atol=1e-9)
            assert (plan - exact).abs().max() < 2e-3, output["id"]
            if output["n_iters"] >= 1:  # as balanced as the exact one
                imbalance = [(p.double().mean(0) * p.shape[1] - 1).abs().mean() for p in (plan, exact)]
                assert abs(imbalance[0] - imbalance[1]) < 1e-3, output["id"]
            if output["n_iters"] == 0:
                continue  # the original then returns the bare kernel, whose rows do not sum to 1: 3 outputs
            stored = tensors.get(f"{output['id']}/Q_exact64")
            if stored is not None and stored.isfinite().all():
                torch.testing.assert_close(plan64, stored.double(), rtol=1e-4, atol=1e-6, msg=output["id"])
            if not output["official_failure"]:  # no further from the original than the exact plan is
                known = output["max_abs_diff_from_Q_exact64"]
                assert (plan - tensors[f"{output['id']}/Q"]).abs().max() <= known + 1e-5, output["id"]
            checked += 1
            failures_of_the_original += output["official_failure"]
    assert (checked, failures_of_the_original, refused) == (147, 38, 3)
    count_golden("plans", checked - failures_of_the_original)
    count_golden("plans on which the original fails", failures_of_the_original)


# ---- quantizer -------------------------------------------------------------------------------------------------------


def quantizer_cases(golden):
    index, tensors = json.loads((golden / "quantizer.json").read_text()), load_file(golden / "quantizer.safetensors")
    for case in index:
        values = {k.removeprefix(case["id"] + "/"): v for k, v in tensors.items() if k.startswith(case["id"] + "/")}
        if "grad.x" in values:
            yield case, values


def build_quantizer(case, values):
    quantizer = OptVQQuantizer(**quantizer_arguments(case["kwargs"]))
    state = {
        name.replace("proj.", "projection."): v for name, v in values.items() if name.startswith(("embed", "proj"))
    }
    assert not quantizer.load_state_dict(state, strict=False).unexpected_keys
    return quantizer


def rows_of(quantizer, x):
    x = x.movedim(1, -1) if x.ndim == 4 else x
    return x.reshape(-1, quantizer.head_dim)


def flat_codes(codes):
    return (codes.movedim(1, -1) if codes.ndim == 4 else codes).reshape(-1)


def test_quantizer_codes(golden):
    agreement = []
    for case, values in quantizer_cases(golden):
        quantizer = build_quantizer(case, values)
        transport = case["quantizer"] == "VectorQuantizerSinkhorn"
        quantizer.training_assignment = "sinkhorn" if transport else "nearest"
        codes = quantizer(values["x"]).codes
        assert codes.shape == values["indices"].shape
        cost = torch.cdist(
            rows_of(quantizer, values["x"]).double(),
            quantizer.get_codebook().detach().double(),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        settings = {"epsilon": quantizer.epsilon, "iterations": quantizer.iterations}
        log_plan = (
            exact_iteration(cost, normalization=quantizer.normalization, dim=quantizer.head_dim, **settings)
            if transport
            else -cost
        )
        decided = margins(log_plan) > 1e-3
        assert (flat_codes(codes) == log_plan.argmax(1))[decided].all(), case["id"]
        if case["id"] != "sinkhorn_b_lt_k":  # far fewer tokens than codes: there, rounding decides in the original
            agreement.append((codes == values["indices"]).flatten())
    assert torch.cat(agreement).float().mean() >= 0.94


def test_quantizer_values_losses_and_gradients_for_the_stored_codes(golden, monkeypatch, count_golden):
    compared = 0
    for case, values in quantizer_cases(golden):
        quantizer = build_quantizer(case, values)
        quantizer.training_assignment = "nearest"
        monkeypatch.setattr(quantizer_optvq, "nearest_assign", lambda *_, v=values, **__: flat_codes(v["indices"]))
        x = values["x"].clone().requires_grad_()
        output = quantizer(x)
        assert torch.equal(output.codes, values["indices"])
        close(output.quantized, values["x_q"], **VALUES)
        close(output.loss, values["loss"], **VALUES)
        total = output.loss + (output.quantized * values["w"]).sum()
        close(total, values["total"], **VALUES)
        total.backward()
        close(x.grad, values["grad.x"], **GRADIENTS)
        close(quantizer.embedding.weight.grad, values["grad.embedding.weight"], **GRADIENTS)
        if "grad.proj.weight" in values:
            close(quantizer.projection.weight.grad, values["grad.proj.weight"], **GRADIENTS)
            close(quantizer.projection.bias.grad, values["grad.proj.bias"], **GRADIENTS)
        compared += 1
    assert compared == 29
    count_golden("quantizers with gradients", compared)


def test_lookup(golden, count_golden):
    tensors = load_file(golden / "quantizer.safetensors")
    for heads, projected in ((1, True), (2, True), (4, True), (4, False)):
        case = f"embed_code_h{heads}_{'proj' if projected else 'noproj'}"
        values = {k.removeprefix(case + "/"): v for k, v in tensors.items() if k.startswith(case + "/")}
        quantizer = OptVQQuantizer(codebook_size=40, dim=16, num_heads=heads, use_projection=projected)
        state = {k.replace("proj.", "projection."): v for k, v in values.items() if k.startswith(("embed", "proj"))}
        quantizer.load_state_dict(state, strict=False)
        close(quantizer.get_codebook(), values["codebook"], **VALUES)
        close(quantizer.lookup(values["codes_image"]), values["out_image"], **VALUES)
        # The original returns a square image for a sequence; ours is (B, T, C).
        sequence = quantizer.lookup(values["codes_sequence"])
        close(sequence.movedim(-1, 1).unflatten(-1, (4, 4)), values["out_sequence"], **VALUES)
        count_golden("lookups")


def test_quantization_warm_up(golden, count_golden):
    """Before the original starts to quantize its output is its input; loss and codes are the same as after."""
    tensors = load_file(golden / "quantizer.safetensors")
    values = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("start_quantize_steps/")}
    kwargs = {"n_e": 16, "e_dim": 8, "beta": 0.25, "num_head": 2, "loss_q_type": "l2"}
    quantizer = build_quantizer({"kwargs": kwargs}, values)
    for step in ("train_step1", "train_step100", "eval_step1"):
        quantizer.train(step != "eval_step1")
        quantizer.bypass = step == "train_step1"
        output = quantizer(values["x"], assignment="sinkhorn")
        assert torch.equal(output.codes, values[f"{step}/indices"])
        close(output.loss, values[f"{step}/loss"], **VALUES)
        close(output.quantized, values[f"{step}/x_q"], **VALUES)
        count_golden("quantizers around the warm-up")


def test_sampling_frequencies(golden, count_golden):
    """Samples follow the plan, which is the original's up to its guards."""
    tensors = load_file(golden / "quantizer.safetensors")
    values = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith("use_prob/")}
    kwargs = {"n_e": 16, "e_dim": 8, "beta": 0.25, "num_head": 2, "loss_q_type": "l2", "use_proj": False}
    quantizer = build_quantizer({"kwargs": kwargs}, values)
    torch.manual_seed(0)
    draws = torch.stack([flat_codes(quantizer(values["x"], assignment="sample").codes) for _ in range(400)])
    frequencies = torch.nn.functional.one_hot(draws, 16).float().mean(dim=0)
    assert (frequencies - values["Q"]).abs().max() < 5 * (0.25 / 400) ** 0.5
    assert (frequencies - values["empirical_frequency"]).abs().max() < 7 * (0.25 / 400) ** 0.5
    count_golden("sampling quantizers")


def test_one_problem_for_two_ranks(golden, count_golden):
    """Where the original is right: one process on all tokens, and the plan of the cost of all tokens.

    That two processes of ours give what one gives is shown in tests/distributed.
    """
    values = load_file(golden / "two_ranks.safetensors")
    quantizer = OptVQQuantizer(codebook_size=48, dim=8, num_heads=2, use_projection=False)
    quantizer.embedding.weight.data.copy_(values["embedding.weight"])
    tokens = torch.cat(list(values["x"]), dim=1)
    output = quantizer(tokens)
    agreement = (output.codes == values["one_process/indices"]).float().mean()
    assert agreement >= 0.94
    plan = sinkhorn_plan(values["global/normalized_cost"], epsilon=10.0, iterations=5, normalization="none")
    exact = exact_iteration(values["global/normalized_cost"], epsilon=10.0, iterations=5, normalization="none")
    torch.testing.assert_close(plan.double(), exact.softmax(1), rtol=1e-3, atol=1e-6)
    known = (values["global/Q"] - exact.softmax(1)).abs().max()
    assert (plan - values["global/Q"]).abs().max() <= known + 1e-5
    of_ranks = torch.cat([values[f"rank{rank}/Q_of_global_cost"] for rank in range(2)])
    assert (plan - of_ranks).abs().max() <= known + 1e-5
    codes = sinkhorn_assign(rows_of(quantizer, tokens), values["embedding.weight"], **PAPER).codes
    assert torch.equal(codes, flat_codes(output.codes))
    count_golden("two-rank cases")


# ---- models ----------------------------------------------------------------------------------------------------------

MODELS = [model["id"] for model in json.loads((GOLDEN / "models.json").read_text())]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_model_activations(golden, name, count_golden):
    model = load_reference_model(golden / name)
    values = load_file(golden / name / "activations.safetensors")
    close(model.encoder(values["pixel_values"]), values["encoder_out"], **VALUES)
    encoded = model.encode(values["pixel_values"])
    close(encoded.latents, values["quant_conv_out"], **VALUES)
    assert encoded.codes.shape == values["indices"].shape
    assert (encoded.codes == values["indices"]).float().mean() >= 0.94

    cost = torch.cdist(rows_of(model.quantizer, values["quant_conv_out"]).double(), model.get_codebook().double())
    log_plan = exact_iteration(cost, epsilon=10.0, iterations=5, normalization="zscore")
    log_plan = -cost if name.endswith("basevq") else log_plan
    decided = margins(log_plan) > (5e-4 if name.endswith("basevq") else 1e-2)
    assert decided.float().mean() > 0.9
    assert (flat_codes(encoded.codes) == log_plan.argmax(1))[decided].all()

    nearest = model.encode(values["pixel_values"], assignment="nearest")
    decided = values["margin_nearest"] > 5e-4
    assert (flat_codes(nearest.codes) == flat_codes(values["indices_nearest"]))[decided].all()

    # With the stored codes fed in, everything after them.
    close(model.quantizer.lookup(values["indices"]), values["quant"], **VALUES)
    close(model.post_quant_conv(values["quant"]), values["post_quant_conv_out"], **VALUES)
    close(model.decode(quantized=values["quant"]).reconstruction, values["reconstruction"], **VALUES)
    close(model.decode(codes=values["indices"]).reconstruction, values["decode_code"], **VALUES)
    close(model.decode(codes=values["indices_nearest"]).reconstruction, values["reconstruction_nearest"], **VALUES)
    count_golden("models with all activations")


def test_training_step(golden, monkeypatch, count_golden):
    folder = golden / "model_plaincnn_mnist"
    model, values = load_reference_model(folder).train(), load_file(folder / "train_step.safetensors")
    codes = flat_codes(values["indices"])
    solve = quantizer_optvq.sinkhorn_assign
    monkeypatch.setattr(quantizer_optvq, "sinkhorn_assign", lambda *a, **k: solve(*a, **k)._replace(codes=codes))
    pixel_values = values["pixel_values"].clone().requires_grad_()
    output = model(pixel_values)
    difference = output.reconstruction - pixel_values
    close(difference.abs().mean(), values["loss_l1"], **VALUES)
    close(difference.square().mean(), values["loss_l2"], **VALUES)
    close(output.quantizer_loss, values["loss_q"], **VALUES)
    loss = difference.abs().mean() + difference.square().mean() + output.quantizer_loss
    close(loss, values["loss"], **VALUES)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the stored gradients are the clipped ones

    close(pixel_values.grad, values["grad.pixel_values"], **GRADIENTS)
    gradients = {
        convert_name(name.removeprefix("grad."), model.config): tensor
        for name, tensor in values.items()
        if name.startswith("grad.") and name != "grad.pixel_values"
    }
    assert len(gradients) == 31
    for name, parameter in model.named_parameters():
        close(parameter.grad, gradients[name], **GRADIENTS)

    torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-7, weight_decay=0.05).step()
    monkeypatch.undo()
    output = model(values["pixel_values"])
    difference = output.reconstruction - values["pixel_values"]
    loss = difference.abs().mean() + difference.square().mean() + output.quantizer_loss
    close(loss, values["loss_after_one_step"], rtol=5e-3, atol=0)  # its codes are the solver's own
    count_golden("training steps with gradients")


def test_the_subset_is_cut_from_the_whole(tmp_path):
    if GOLDEN == SUBSET:
        pytest.skip("the whole set of the original's values is not beside the checkout")
    cut(GOLDEN, tmp_path)
    files = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    own = {Path("README.md"), Path("LICENSE"), Path("cut.py")}
    assert files | own == {
        path.relative_to(SUBSET) for path in SUBSET.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    for name in files:
        if name.suffix == ".safetensors":
            kept, whole = load_file(SUBSET / name), load_file(tmp_path / name)
            assert kept.keys() == whole.keys()
            assert all(torch.equal(kept[key].nan_to_num(7), tensor.nan_to_num(7)) for key, tensor in whole.items())
        else:
            assert (SUBSET / name).read_text() == (tmp_path / name).read_text()
    assert sum(path.stat().st_size for path in SUBSET.rglob("*") if path.is_file()) < 3_000_000
