"""What two processes agree on. Whole runs of two processes are under the mark `distributed`."""

TWO = """
import os, sys
import torch
import torch.distributed as dist
from optvq_hf.sinkhorn import sinkhorn_assign
from optvq_hf.training.processes import average_gradients, broadcast, gather, is_first, mean_over_processes, world_size

child = os.fork()
rank = int(child == 0)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
assert world_size() == 2 and is_first() == (rank == 0)

x = torch.tensor([1.0 + rank], requires_grad=True)
mean = mean_over_processes(x)
assert mean == 1.5
mean.square().backward()
assert x.grad == 3.0  # 2 * 1.5 / 2 from each process

parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.full((2,), float(rank))
average_gradients([parameter, torch.nn.Parameter(torch.zeros(3))])
assert (parameter.grad == 0.5).all()
assert gather(torch.tensor([rank, rank + 10])).tolist() == [0, 1, 10, 11]
assert broadcast(torch.tensor(rank)) == 0

generator = torch.Generator().manual_seed(0)
features, codebook = torch.randn(600, 8, generator=generator), torch.randn(64, 8, generator=generator)
settings = {"epsilon": 10.0, "iterations": 5, "normalization": "zscore"}
mine = sinkhorn_assign(features.split([500, 100])[rank], codebook, process_group=dist.group.WORLD, **settings)
whole = sinkhorn_assign(features, codebook, **settings)
assert torch.equal(mine.codes, whole.codes.split([500, 100])[rank])
dist.destroy_process_group()
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


def test_two_processes(new_process, tmp_path):
    done = new_process(TWO, tmp_path)
    assert done.returncode == 0, done.stderr
