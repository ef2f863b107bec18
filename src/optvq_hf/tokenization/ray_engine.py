"""The engine of Ray Data: an actor pool makes the shards. Ray schedules, and makes anew what a lost worker had in hand.

The shards are those of the local engine, to the last byte. All nodes need one file system for them.
"""

from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .job import TokenizationJob
from .manifest import difference
from .shards import ShardWriter, Wanted


class ShardActor:
    """Makes the shards whose numbers it is given, and returns how many images each has.

    Args:
        job: What is tokenized. Every actor loads model and images once.
        settings: Of the driver; those of the actor must be the same.
    """

    def __init__(self, job: TokenizationJob, settings: dict[str, Any]):
        self.job, self.writer = job, job.writer()
        self.wrong = difference(settings, job.settings(self.writer))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int]]:
        if self.wrong:
            raise ValueError(
                f"the driver tokenizes with {self.wrong} of an actor: all nodes need the same files and versions"
            )
        numbers = [int(number) for number in batch["shard"]]
        images = []
        for number in numbers:
            for _, _, shard in self.writer.write(lambda shard, wanted=number: shard == wanted):
                if shard is not None:
                    images.append(shard.images)
        return {"shard": numbers, "images": images}


def tokenize_with_ray(job: TokenizationJob, writer: ShardWriter, settings: dict[str, Any]) -> None:
    """Makes all shards that are not finished, in the cluster that RAY_ADDRESS names or a new one on this machine.

    Args:
        settings: Of the job, by which actors see that they make the same.

    Raises:
        ImportError: If Ray is not installed.
        ValueError, OSError: As [`ShardWriter.write`].
    """
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ImportError as error:
        raise ImportError('ray is not installed: run pip install "optvq_hf[ray]"') from error

    source = writer.source
    wanted = Wanted(job.folder, source.num_shards)
    source.num_found = source.num_shards or 0
    missing = [shard for shard in range(source.num_found) if wanted(shard)]
    kept = sum(shard.images for shard in wanted.kept.values())
    if not missing:
        return
    started_here = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) > 0 else 0
    actors = min(job.arguments.num_actors, len(missing))
    try:
        shards = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing))
        made: Any = shards.map_batches(
            ShardActor,
            fn_constructor_args=[job, settings],
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_gpus=num_gpus,
        )
        total = len(source.rows or ())
        with tqdm(total=total, initial=kept, desc="tokenizing", unit="img", disable=None) as bar:
            for row in made.iter_rows():
                bar.update(row["images"])
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        raise ValueError(f"an actor of Ray failed: {' '.join(str(cause).split())[-400:]}") from error
    finally:
        if started_here:
            ray.shutdown()
