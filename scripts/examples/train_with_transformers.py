"""Train a tokenizer with `transformers.Trainer`, which minimises the loss of OptVQModel.

    python scripts/examples/train_with_transformers.py --max-steps 200

`optvq train` adds adversarial and perceptual losses, schedules of the transport, alarms and exact resume.
"""

import argparse

from datasets import load_dataset
from transformers import Trainer, TrainingArguments

from optvq_hf import OptVQConfig, OptVQImageProcessor, OptVQModel
from optvq_hf.data.loading import EMBEDDED


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default=str(EMBEDDED["fashion_mnist_sample"]), help="Hub id or folder")
    parser.add_argument("--max-steps", default=200, type=int, help="Optimizer steps")
    parser.add_argument("--output-dir", default="runs/with_transformers", help="Folder for the model and checkpoints")
    arguments = parser.parse_args(argv)

    dataset = load_dataset(arguments.dataset)
    size = {"height": 32, "width": 32}
    processor = OptVQImageProcessor(num_channels=1, size={"shortest_edge": 32}, crop_size=size)

    def collate(rows: list[dict]) -> dict:
        pixel_values = processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        # Without labels, the Trainer computes an eval_loss only if the batch asks for the loss.
        return {"pixel_values": pixel_values, "return_loss": True}

    config = OptVQConfig(
        backbone="plain_cnn", image_size=32, num_channels=1, codebook_size=1024, codebook_dim=8, num_codebook_heads=4
    )
    trainer = Trainer(
        OptVQModel(config),
        TrainingArguments(
            arguments.output_dir,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=64,
            learning_rate=5e-3,
            warmup_steps=10,
            lr_scheduler_type="cosine",
            remove_unused_columns=False,  # the image column is not an argument of the model: `collate` reads it
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    processor.save_pretrained(arguments.output_dir)
    print(f"eval_loss {metrics['eval_loss']:.4f}; the model is in {arguments.output_dir}")
    return metrics


if __name__ == "__main__":
    main()
