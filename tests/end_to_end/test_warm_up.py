"""One rank of a host compiles; the others find what it compiled in the cache."""

import json
import sys

from tests.support.commands import ENVIRONMENT, free_port, make_run
from tests.support.inductor import require_inductor
from tests.support.processes import run_ranks

SCRIPT = """
import json, os, sys
from pathlib import Path
from megatron_tf import pretrain
from torch._dynamo.utils import counters

code = pretrain.main(sys.argv[2:])
found = {key: counters["inductor"][key] for key in ("fxgraph_cache_miss", "fxgraph_cache_hit")}
Path(sys.argv[1], "rank" + os.environ["RANK"]).write_text(json.dumps(found))
sys.exit(code)
"""


def test_only_one_rank_compiles(tmp_path):
    require_inductor()
    make_run(tmp_path, training={"train_iters": 1})
    (tmp_path / "counting.py").write_text(SCRIPT)
    options = ["--kernels.pattention=compiled", "--parallel.tensor_model_parallel_size=2"]
    done = run_ranks(
        [sys.executable, tmp_path / "counting.py", tmp_path, tmp_path / "run.yaml", *options],
        2,
        environment={**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        port=free_port(),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert first["fxgraph_cache_miss"] > 0
    assert second["fxgraph_cache_miss"] == 0
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"] + first["fxgraph_cache_hit"]
