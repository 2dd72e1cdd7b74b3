"""configs/accelerate, read as `accelerate launch --config_file` reads them, down to the processes' environment."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from ldm.training import sharded

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.fixture
def environment(monkeypatch):
    """(file) -> the launcher's arguments, and the environment that it gives to each process; "simple" where it starts
    one."""

    def read(name, *further):
        command = [f"--config_file={FOLDER / name}.yaml", "--main_process_port=0", *further, "train/train_ldm.py"]
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ""
            return arguments, prepare_deepspeed_cmd_env(arguments)[1]
        if arguments.use_fsdp or arguments.multi_gpu:
            return arguments, prepare_multi_gpu_env(arguments)
        return arguments, prepare_simple_launcher_cmd_env(arguments)[1]

    return read


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    assert load_config_from_file(str(path)).mixed_precision == "no"  # training.precision decides


def test_one_gpu(environment):
    arguments, given = environment("one_gpu")
    assert arguments.num_processes == 1 and not arguments.multi_gpu
    assert "MASTER_PORT" not in given  # which would mean that several were asked for


def test_eight_gpus(environment):
    arguments, given = environment("eight_gpus")
    assert arguments.multi_gpu and arguments.nproc_per_node == "8"
    assert "ACCELERATE_USE_FSDP" not in given


def test_multi_node(environment):
    arguments, _ = environment("multi_node", "--machine_rank=1", "--main_process_ip=10.1.2.3")
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
    assert arguments.rdzv_endpoint.startswith("10.1.2.3:")


def test_fsdp2(environment, monkeypatch):
    _, given = environment("fsdp2")
    for name in ("ACCELERATE_USE_FSDP", *(name for name in given if name.startswith("FSDP_"))):
        monkeypatch.setenv(name, given[name])
    plugin = sharded.plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap == ["ResnetBlock2D", "Transformer2DModel"]
    assert plugin.mixed_precision_policy.param_dtype is None


def test_deepspeed(environment):
    arguments, given = environment("deepspeed_zero2")
    assert arguments.num_processes == 8
    assert given["ACCELERATE_USE_DEEPSPEED"] == "true" and given["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
