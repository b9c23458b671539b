"""How ranks are started, and what is asked of each.

Four processes are started once. Groups of 2, 3 and 4 of them run the cases; a group's first rank is not the world's.
"""

import contextlib
import datetime
import os
import traceback
import weakref

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import kdkernels as kd
from kdkernels.core import exchange, shards

WORLD = 4


class counted:
    """Every collective that is started meanwhile, with the bytes that this rank gives."""

    NAMES = (
        "all_reduce",
        "all_gather_object",
        "all_gather_single",
        "all_gather_into_tensor",
    )

    def __enter__(self):
        self.calls = []
        self.kept = {(dist, name): getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name in ("all_gather", "reduce_scatter"):
            self.kept[exchange, name] = getattr(exchange, name)
        for (module, name), function in self.kept.items():
            setattr(module, name, self.noting(name, function))
        return self.calls

    def noting(self, name, function):
        def noted(*args, **kwargs):
            given = args[0] if name == "all_reduce" else args[-1]
            size = given.numel() * given.element_size() if isinstance(given, torch.Tensor) else 0
            self.calls.append((name, size))
            return function(*args, **kwargs)

        return noted

    def __exit__(self, *error):
        for (module, name), function in self.kept.items():
            setattr(module, name, function)


def leaf(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape).requires_grad_()


def told(call, pattern):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error), pattern
    return "nothing", "", pattern


@contextlib.contextmanager
def patched(owner, name, value):
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def killed(rank, folder):
    """Rank 1 dies between two losses; rank 0 writes what the second one says."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/killed",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=20),
    )
    student = kd.ShardedLogits(torch.zeros(3, 5), kd.Shard())
    kd.cross_entropy(student, torch.tensor([2, 4, 9]))
    if rank == 1:
        os._exit(0)
    said = told(lambda: kd.cross_entropy(student, torch.tensor([2, 4, 9])), "")
    torch.save(said, f"{folder}/said")
    os._exit(0)


def ended(rank, folder):
    """The last thing that a program does with its group is a loss; rank 0 writes whether the group is gone after it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/ended", rank=rank, world_size=2)
    group = weakref.ref(dist.group.WORLD)
    for shard in (kd.Shard(), shards.even_shard(group(), 10)):
        kd.cross_entropy(kd.ShardedLogits(torch.zeros(3, 5), shard), torch.tensor([2, 4, 9]))
    del shard
    dist.destroy_process_group()
    if rank == 0:
        torch.save(group() is None, f"{folder}/gone")


def on_rank(rank, folder, given):
    """Every case of this rank's groups; an exception is a result too."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # new memory is NaN until it is written
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    groups = {size: dist.new_group(list(range(WORLD - size, WORLD))) for size in (2, 3, 4)}
    made = {}
    for key, size, work, *rest in given:
        if rank < WORLD - size:
            continue
        try:
            made[key] = work(*rest, groups[size])
        except Exception:
            made[key] = traceback.format_exc()
    torch.save(made, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def run(folder, given):
    """``work(*rest, group)`` of every (key, ranks, work, *rest), on each rank: {key: [results by rank]}."""
    mp.spawn(on_rank, (str(folder), given), WORLD)
    made = [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(WORLD)]
    return {key: [results[key] for results in made if key in results] for key, *_ in given}
