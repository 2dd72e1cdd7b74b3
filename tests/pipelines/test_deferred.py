"""`ldm generate` draws without what it does not need, all of which is there for those who do."""

import subprocess
import sys

DRAW = """
import sys
from pipelines.cli import console
sys.argv = ["ldm", "generate", "a photo of a cat", "--output", sys.argv[1], "--num-inference-steps", "2"]
try:
    console()
except SystemExit as end:
    assert not end.code, end.code
left_out = ("torch._dynamo", "torch.distributed.tensor", "scipy", "sklearn", "bitsandbytes", "torchvision")
print([name for name in left_out if sys.modules.get(name) is not None])
import torch
assert torch._dynamo.config.recompile_limit > 0 and torch._dynamo.__file__
assert torch.distributed.is_available()
"""
MARK = """
import sys
from pipelines.deferred import COMPILER, drawing_alone
import torch
with drawing_alone():
    mark = torch.compiler.disable(lambda x: x + 1)
    assert COMPILER in sys.modules and not hasattr(sys.modules[COMPILER], "__file__")
    assert sys.argv[1] == "marks" or torch._dynamo.config.recompile_limit > 0  # asks for more than marks
    assert mark(1) == 2
assert (COMPILER in sys.modules) is (sys.argv[1] == "more")
assert torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(2)).tolist() == [2, 2]
"""


def run(script: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_drawing_imports_no_compiler(tmp_path):
    assert run(DRAW, tmp_path / "cat.png").splitlines()[-1] == "[]"


def test_the_compiler_is_there_afterwards_and_for_whoever_asks():
    run(MARK, "marks")
    run(MARK, "more")
