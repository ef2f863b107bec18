"""Compares `transformers.Trainer` with `optvq train`: the same model, optimizer, schedule and batches.

    python scripts/compare_trainers.py --max-steps 200

Trains the model of `scripts/recipes/quickstart.yaml` both ways and prints PSNR and codebook usage on the test split, and the
Trainer's eval_loss. Epsilon is constant, because the Trainer has no schedule for it; with `--recipe-schedule`,
`optvq train` follows that of the recipe. About a minute per way and 200 steps on one CPU core.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path


# Python puts this folder first on its path, where evaluate.py would hide the `evaluate` library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402
from torch.utils.data import IterableDataset  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from optvq_hf.commands.train import make_parser  # noqa: E402
from optvq_hf.data.batches import evaluation_batches  # noqa: E402
from optvq_hf.evaluation.evaluator import evaluate_model  # noqa: E402
from optvq_hf.training.arguments import Recipe  # noqa: E402
from optvq_hf.training.optimization import make_optimizer, make_schedule  # noqa: E402
from optvq_hf.training.preparation import make_run  # noqa: E402


class Images(IterableDataset):
    """Yields the images of batches one by one."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            for image in batch:
                yield {"pixel_values": image}


def collate(rows: list[dict]) -> dict:
    """Makes a batch that asks for the loss in evaluation too."""
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "return_loss": True}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", default=200, type=int, help="Optimizer steps")
    parser.add_argument(
        "--recipe-schedule", action="store_true", help="Let `optvq train` follow the recipe's epsilon and balance"
    )
    arguments = parser.parse_args(argv)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--config",
            "quickstart",
            "--max-steps",
            str(arguments.max_steps),
            "--output-dir",
            str(Path(folder) / "ours"),
        ]
        flags += ["--report-to", "none", "--images-every", "0"]
        *of_run, data, model_arguments = make_parser().parse(flags)
        recipe = Recipe(*of_run)
        if not arguments.recipe_schedule:
            recipe.codebook.epsilon_schedule = recipe.codebook.balance_schedule = None
        fields = {name: value for name, value in vars(model_arguments).items() if value is not None}

        run, _ = make_run(recipe, data, fields)
        run.train()
        results["optvq train"] = measure(run.model, run.image_processor, data)

        recipe.training.output_dir = str(Path(folder) / "trainer")
        run, _ = make_run(recipe, data, fields)  # a new one, for its model and batches
        model, training, optimization = run.model, recipe.training, recipe.optimization
        model.quantizer.defer_updates = False  # the default, as for any user of the Trainer
        optimizer = make_optimizer(
            model,
            optimization.learning_rate,
            optimization.weight_decay,
            optimization.adam_beta2,
            list(model.quantizer.parameters()),
            optimization.codebook_learning_rate_multiplier,
        )
        schedule = make_schedule(optimizer, arguments.max_steps, optimization.warmup_ratio)
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=arguments.max_steps,
                per_device_train_batch_size=training.batch_size,
                per_device_eval_batch_size=training.batch_size,
                max_grad_norm=optimization.max_grad_norm,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=collate,
            train_dataset=Images(run.batches),
            eval_dataset=Images(evaluation_batches(data, run.image_processor, training.batch_size)),
            optimizers=(optimizer, schedule),
        )
        trainer.train()
        eval_loss = trainer.evaluate()["eval_loss"]
        results["transformers.Trainer"] = {**measure(model, run.image_processor, data), "eval_loss": eval_loss}
    print(json.dumps(results, indent=1))
    return results


def measure(model, image_processor, data) -> dict:
    """PSNR in dB and codebook usage in % on the test split."""
    batches = evaluation_batches(data, image_processor, 64)
    [evaluation] = evaluate_model(model.eval(), batches, ["nearest"], num_shown=0).values()
    return {name: evaluation.metrics[name] for name in ("psnr", "mse", "codebook_usage")}


if __name__ == "__main__":
    main()
