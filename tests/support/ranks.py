"""Runs functions on several gloo ranks: processes are started once per session and used for every world size."""

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from queue import Empty

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from megatron_tf.parallel.mesh import Mesh, build_mesh
from tests.support.processes import context
from tests.support.seed import SEED

TIMEOUT = timedelta(seconds=30)


class RankPool:
    """Pool of ranks: `run(function, tensor, pipeline, data, *args)` calls function(mesh, *args) on every rank of that
    layout, with `context` context-parallel ranks; parameters are sharded over `shard_size` data-parallel ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self):
        size = self.size
        self.results = context().Queue()
        self.tasks = [context().Queue() for _ in range(size)]
        self.processes = [
            context().Process(target=_serve, args=(rank, self.tasks[rank], self.results), daemon=True)
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, tensor, pipeline, data, *args, context=1, shard_size=None):
        """Return the results in rank order; a rank's exception is raised here with its traceback."""
        world = tensor * pipeline * data * context
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank in range(world):
                self.tasks[rank].put((function, (tensor, pipeline, data, context, shard_size), store, args))
            answers = {}
            for _ in range(world):
                rank, error, result = self._next_answer()
                if error:
                    self.close()  # the other ranks wait for it: the pool can't be used any more
                    self._start()
                    raise AssertionError(f"rank {rank} of {world} failed:\n{error}")
                answers[rank] = result
        return [answers[rank] for rank in range(world)]

    def _next_answer(self):
        try:
            return self.results.get(timeout=240)
        except Empty:
            self.close()
            self._start()
            raise AssertionError("no rank answered in 240 s") from None

    def close(self) -> None:
        """Stop the processes."""
        for process in self.processes:
            process.kill()


def _serve(rank, tasks, results):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    while True:
        function, (tensor, pipeline, data, context, shard_size), store, args = tasks.get()
        world = tensor * pipeline * data * context
        torch.manual_seed(SEED)
        try:
            mesh = Mesh(torch.device("cpu"))
            if world > 1:
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
                )
                mesh = build_mesh(
                    torch.device("cpu"),
                    tensor=tensor,
                    pipeline=pipeline,
                    data=data,
                    context=context,
                    shard_size=shard_size,
                )
            result, error = function(mesh, *args), None
        except BaseException:
            result, error = None, traceback.format_exc()
        results.put((rank, error, result))
        if world > 1 and dist.is_initialized():
            dist.destroy_process_group()
            _clear_sharding_prop_cache()  # it would return meshes of an earlier world, whose groups no longer exist
