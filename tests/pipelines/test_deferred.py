"""`ldm generate` draws without what it does not need, all of which is there for those who do."""

import subprocess
import sys

import torch
from PIL import Image, ImageChops
from safetensors.torch import save_file

DRAW = """
import gc, sys
import torch
from pipelines.cli import console
by_torch = set(sys.modules)  # which releases differ in
sys.argv = ["ldm", "generate", "a photo of a cat", "--num-inference-steps", "2", "--output", *sys.argv[1:]]
try:
    console()
except SystemExit as end:
    assert not end.code, end.code
left_out = ("torch._dynamo", "torch.distributed.tensor", "sympy", "transformers.models", "scipy", "sklearn",
            "bitsandbytes", "torchvision", "peft")
print([name for name in left_out if name not in by_torch and sys.modules.get(name) is not None])
assert gc.isenabled() and (gc.get_freeze_count() > 0) is ("triton" not in sys.modules)
import transformers.models
assert transformers.models.__file__ and transformers.models.clip is sys.modules["transformers.models.clip"]
assert transformers.models.t5.T5Config and transformers.T5Config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
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
    assert done.returncode == 0 and "leaked" not in done.stderr, done.stderr
    return done.stdout


def test_draws_without_them_from_a_picture_too_and_with_adapters(tmp_path):
    """Adapters need PEFT, which a drawing without them does not import."""
    layer, width = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 192
    weights = {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(width, 2)}
    save_file({f"{layer}.{name}": weight for name, weight in weights.items()}, tmp_path / "lora.safetensors")
    pictures = []
    for number, given in enumerate(([], ["--image", tmp_path / "0.png"], ["--lora", tmp_path / "lora.safetensors"])):
        left = run(DRAW, tmp_path / f"{number}.png", *given).splitlines()[-1]
        assert left == "[]" or "--lora" in given, left
        pictures.append(Image.open(tmp_path / f"{number}.png"))
    assert all(ImageChops.difference(pictures[0], other).getbbox() is not None for other in pictures[1:])


def test_the_compiler_is_there_afterwards_and_for_whoever_asks():
    run(MARK, "marks")
    run(MARK, "more")
