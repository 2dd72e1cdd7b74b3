"""Exact log-likelihood of a diffusion model, by the probability-flow ODE (Song et al. 2021, §4.3 and appendix D.2)."""

import math

import torch
from torch import Tensor

from ldm.diffusion.sde import Score, VariancePreserving, divergence, flow_drift
from ldm.errors import RunError, UserError


def log_likelihood(
    process: VariancePreserving,
    score: Score,
    x: Tensor,
    start: float = 0.0,
    tolerance: float = 1e-6,
    probes: Tensor | None = None,
) -> Tensor:
    """log p(x) (B,) in nats of samples x (B, …), in float64.

    log p_0(x(0)) = log p_1(x(1)) + ∫ ∇·f dt along the flow (equation 39), p_1 a standard normal, by SciPy's adaptive
    Runge–Kutta of order 5(4). `start` > 0 for a score that is not finite at 0; `probes` (K, B, …) for Hutchinson's
    estimate of the divergence instead of the exact one. What the process leaves of the data at t = 1 is an error of
    about √ᾱ(1), as x(1) is taken for normal.

    Raises:
        RunError: the solver gave up.
        UserError: SciPy is not installed.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        raise UserError('log-likelihoods need SciPy; pip install "ldm[mathematics]"') from None
    shape, size = x.shape, x.numel()

    def derivative(t: float, state):
        y = torch.from_numpy(state[:size]).view(shape).to(x.device)
        time = torch.full((shape[0],), t, dtype=torch.float64, device=x.device)
        value, trace = divergence(lambda z: flow_drift(process, score, z, time), y, probes)
        return torch.cat([value.flatten(), trace]).cpu().numpy()

    first = torch.cat([x.double().flatten().cpu(), torch.zeros(shape[0], dtype=torch.float64)]).numpy()
    solution = solve_ivp(derivative, (start, 1.0), first, method="RK45", rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise RunError(f"log-likelihood: the ODE solver stopped: {solution.message}; raise tolerance ({tolerance:g})")
    last = torch.from_numpy(solution.y[:, -1])
    z, change = last[:size].view(shape).flatten(1), last[size:]
    log_normal = -0.5 * (z**2).sum(dim=1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
    return (log_normal + change).to(x.device)
