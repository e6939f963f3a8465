"""Noise that a model brings along: drop-path and stochastic depth, known by what they do."""

import copy

import torch
from torch import Tensor, nn

# Samples with which a module is asked whether it drops samples: a rate of .001 is missed in exp(-8) of all cases where
# what it keeps is not rescaled, and else never.
_SAMPLES = 8192


def drops_samples(module: nn.Module) -> bool:
    """Whether a module drops whole samples of its input in training mode: drop-path, stochastic depth, by behaviour.

    Modules of torch itself do not; others are tried out on a copy where they have neither weights nor parts.
    """
    if type(module).__module__.startswith("torch.") or any(True for _ in module.parameters()):
        return False
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return any(_drops(copy.deepcopy(module), torch.ones(_SAMPLES, *[2] * n)) for n in (3, 2, 1))


def _drops(module: nn.Module, ones: Tensor) -> bool:
    """Whether ones come back as they were in evaluation mode, and each sample as one number, 0 or not, in training."""
    try:
        quiet, noisy = module.eval()(ones.clone()), [module.train()(ones.clone()) for _ in range(4)]
    except Exception:  # it wants another input: no drop-path
        return False
    if not isinstance(quiet, Tensor) or not torch.equal(quiet, ones):
        return False
    if not all(isinstance(found, Tensor) and found.shape == ones.shape for found in noisy):
        return False
    flat = torch.stack(noisy).flatten(2)
    levels = torch.unique(flat[..., 0])
    return bool((flat == flat[..., :1]).all()) and len(levels) <= 2 and not torch.equal(flat, torch.ones_like(flat))
