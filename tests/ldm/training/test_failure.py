"""Numbers that are not finite: no update is made, and what was seen is recorded."""

import json
import math
import resource
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from ldm.config import TrainingConfig
from ldm.errors import RunError
from ldm.training import failure, optim
from ldm.training.checkpoint import Saved


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A layer, trained on four samples a step."""

    def __init__(self, accelerator, folder, resumed=None):
        torch.manual_seed(0)
        self.layer, self.accelerator = torch.nn.Linear(3, 1), accelerator
        optimizer = optim.build(self.layer, TrainingConfig(learning_rate=0.1))
        self.model, self.optimizer = accelerator.prepare(self.layer, optimizer)
        self.ema = EMAModel(self.layer.parameters())
        self.guard = failure.Guard(accelerator, self.optimizer, folder, resumed)

    def step(self, number, factor=1.0, constant=0.0):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
        loss = self.model(x).square().mean() * factor + constant
        self.accelerator.backward(loss)
        self.guard.saw(loss, torch.arange(4) + 4 * number)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.guard.check(norm, step=number + 1, learning_rate=0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.guard.is_update:
            self.ema.step(self.layer.parameters())

    def everything(self):
        state = optim.optimizer_tensors(self.optimizer)
        return [value.clone() for value in (*self.layer.parameters(), *self.ema.shadow_params, *state.values())]


def equal(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("is_late", [False, True])
def test_no_update_is_made_of_a_gradient_that_is_not_finite(accelerator, tmp_path, value, is_late):
    run = Run(accelerator, tmp_path)
    run.guard.is_late = is_late  # as on CUDA, where the device is told and the numbers are read a step later
    run.step(0)
    run.step(1)
    before = run.everything()
    with pytest.raises(RunError, match=r"step 3: the loss is (nan|inf) at learning rate 1.00e-01 on samples 8, 9, 10"):
        run.step(2, factor=value)
        assert is_late
        weights = [parameter.detach().clone() for parameter in run.layer.parameters()]
        assert equal(weights, before[:2])
        assert equal(list(optim.optimizer_tensors(run.optimizer).values()), before[4:])
        run.guard.settle()
    assert equal([parameter.detach() for parameter in run.layer.parameters()], before[:2])
    record = json.loads((tmp_path / "failure.json").read_text())
    assert record["step"] == 3 and record["samples"] == [8, 9, 10, 11] and record["learning_rate"] == 0.1
    assert record["fault"] == "loss" and record["processes"] == [0]


def test_a_loss_alone_is_enough_and_late_means_the_next_step(accelerator, tmp_path):
    run = Run(accelerator, tmp_path)
    run.guard.is_late = True
    run.step(0, constant=math.inf)
    with pytest.raises(RunError, match="step 1: the loss is inf"):
        run.step(1)


def test_a_gradient_norm_alone_is_enough(accelerator, tmp_path):
    guard = Run(accelerator, tmp_path).guard
    guard.saw(torch.tensor(1.0), torch.arange(20))
    with pytest.raises(RunError, match=r"step 4: the gradient norm is inf .* on samples 0, 1, 2, 3, 4, 5, 6, 7 … \("):
        guard.check(torch.tensor(math.inf), step=4, learning_rate=0.1)


def test_every_micro_batch_counts(accelerator, tmp_path):
    guard = Run(accelerator, tmp_path).guard
    guard.saw(torch.tensor(math.nan), torch.tensor([5]))
    guard.saw(torch.tensor(1.0), torch.tensor([6]))
    with pytest.raises(RunError, match=r"the loss is nan .* on samples 5, 6 "):
        guard.check(torch.tensor(1.0), step=1, learning_rate=0.1)


def test_an_overflow_in_half_precision_is_skipped_and_counted(accelerator, tmp_path):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    run = Run(accelerator, tmp_path)
    run.step(0)
    before = run.everything()
    run.step(1, factor=1e35)  # finite, but not times the scale
    assert equal(run.everything(), before)
    assert run.guard.metrics() == {"skipped_updates": 1} and accelerator.scaler.get_scale() == 32768.0
    run.step(2)
    assert not equal(run.everything(), before) and run.guard.metrics() == {"skipped_updates": 1}

    state = json.loads(json.dumps(run.guard.state()))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    resumed = Run(accelerator, tmp_path, Saved(tmp_path, 3, state)).guard
    assert accelerator.scaler.get_scale() == 32768.0 and resumed.metrics() == {"skipped_updates": 1}


def test_the_average_of_a_run_with_skipped_updates_goes_on_where_it_was(tmp_path):
    """Its warm-up counts updates, not steps."""
    layer = torch.nn.Linear(2, 1)
    ema, again = (optim.moving_average(layer, 0.999) for _ in range(2))
    for _ in range(5):
        optim.update_average(ema, layer)
    saved = Saved(tmp_path, 7, {"skipped_updates": 2})
    optim.load_ema(again, layer, optim.ema_tensors(ema, layer), saved.updates)
    assert again.get_decay(again.optimization_step + 1) == ema.get_decay(ema.optimization_step + 1)


def test_half_precision_unscales_the_gradients_of_one_optimiser_alone(accelerator):
    """As of a discriminator, whose gradients are still being accumulated when the other network's are clipped."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    layers = [torch.nn.Linear(3, 1) for _ in range(2)]
    optimizers = [accelerator.prepare(optim.build(layer, TrainingConfig())) for layer in layers]
    for layer in layers:
        accelerator.backward(layer(torch.ones(1, 3)).sum())
    norm = optim.clip_gradients(accelerator, optimizers[0], layers[0], 10.0)
    assert norm == pytest.approx(2.0)
    assert layers[0].bias.grad == 1 and layers[1].bias.grad == 1024


def test_no_scale_helps_a_gradient_that_is_never_finite(accelerator, tmp_path):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=0.5)
    guard = Run(accelerator, tmp_path).guard
    guard.saw(torch.tensor(1.0), torch.arange(4))
    with pytest.raises(RunError, match="step 3: the gradient norm is inf"):
        guard.check(torch.tensor(math.inf), step=3, learning_rate=0.1)


def test_a_lost_process_is_told_in_words():
    @failure.in_words
    def loses(text):
        raise RuntimeError(text)

    for text, words in (
        ("[unbound_buffer.cc:81] gloo: Timed out waiting 10000ms for recv operation", "training.timeout_seconds"),
        ("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", "has ended"),
    ):
        with pytest.raises(RunError, match=words):
            loses(text)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        loses("mat1 and mat2 shapes cannot be multiplied")


def test_a_full_disk_is_told_in_words(tmp_path):
    """The system refuses files of more than 100 bytes, as it would refuse any on a full disk."""

    @failure.in_words(go_on="run this again")
    def fills(write):
        write()

    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for write in (
            lambda: (tmp_path / "metrics.jsonl").write_text("x" * 1000),
            lambda: save_file({"x": torch.zeros(1000)}, tmp_path / "x.safetensors"),
        ):
            with pytest.raises(RunError, match=r"files cannot be written: .*File too large.*; make room; run this"):
                fills(write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    with pytest.raises(FileNotFoundError):
        fills((tmp_path / "absent" / "x").read_text)


def test_a_compiler_that_is_missing_is_told_in_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))

    @failure.in_words
    def run():
        torch.compile(lambda x: x.sin() * 3 + x.cos())(torch.ones(64))

    with pytest.raises(RunError, match=r"cannot be compiled \(.+\); set training\.compile=false") as told:
        run()
    assert "\n" not in str(told.value)


def test_memory_that_runs_out_is_told_in_words():
    @failure.in_words
    def takes_too_much():
        torch.empty(2**60, dtype=torch.uint8)  # more than any machine has

    with pytest.raises(RunError, match=r"memory ran out .* training\.find_micro_batch=true"):
        takes_too_much()
