"""The optimizers: AdamW for all weights, or Muon for the matrices among them and AdamW for the rest."""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.optim.adamw import adamw

# The first and the last convolution, in DDPMUNet and in diffusers' UNet2DModel. Muon is for the weights between them.
OUTER = ("stem", "conv_in", "conv_out")
MOMENTUM, ROOT_MEAN_SQUARE = 0.95, 0.2
COEFFICIENTS, ITERATIONS, EPSILON = (3.4445, -4.7750, 2.0315), 5, 1e-7


def build_optimizer(config, network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `config`, a `TrainConfig`, asks for.

    The learning rate of each of its groups of parameters is that of AdamW times `scale`.
    """
    betas = config.adam_beta1, config.adam_beta2
    adam = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}
    adam["weight_decay"] = config.adam_weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW([{"params": network.parameters(), "scale": 1.0}], **adam, fused=True)
    first, second = matrices(network)
    taken = {*first, *second}
    scale = config.muon_learning_rate / config.learning_rate
    groups = [
        {"params": [p for p in network.parameters() if p not in taken], "scale": 1.0, "out_axis": None},
        {"params": first, "scale": scale, "out_axis": 0},
        {"params": second, "scale": scale, "out_axis": 1},
    ]
    return Muon([group for group in groups if group["params"]], adam)


def matrices(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights for Muon, by the axis of their output channels: 0, and 1 for those of transposed convolutions.

    They are the weights of all linear layers and convolutions but the first and the last; embeddings, norms and biases
    are left to AdamW.
    """
    found = [], []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d) and name not in OUTER:
            found[isinstance(module, nn.ConvTranspose2d)].append(module.weight)
    return found


class Muon(torch.optim.Optimizer):
    """Momentum whose step for each matrix is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A weight is seen as a matrix (out, in * k * k). Its step has singular values near 1 and is multiplied by
    0.2 sqrt(max(rows, columns)), so that its numbers are about as large as those of AdamW's steps (Liu et al. 2025,
    arXiv:2502.16982, section 2.2). Groups whose `out_axis` is None get AdamW.

    torch.optim.Muon is not used: it takes matrices only, rounds to bfloat16, which is slow on the CPU, and does not
    know `found_inf`.

    Attributes:
        found_inf: set from outside before a step: None, or a tensor () on the device. Unless it is 0, `step` leaves
            weights, momentum and moments as they are, and the host does not wait to read it.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets `found_inf` and does not wait for the device
    found_inf = None

    def __init__(self, groups: list[dict], adam: dict):
        super().__init__(groups, adam)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update all parameters that have a gradient. `closure` is not called; Accelerate passes None."""
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["out_axis"] is None:
                self._adamw(group, given)
                continue
            alike = defaultdict(list)  # one operation for all matrices of a shape: a GPU starts fewer
            for parameter in given:
                alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._muon(group, parameters)

    def _adamw(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
        moments = ([self.state[p][name] for p in parameters] for name in ("exp_avg", "exp_avg_sq"))
        (beta1, beta2), steps = group["betas"], [self.state[p]["step"] for p in parameters]
        adamw(parameters, [p.grad for p in parameters], *moments, [], steps, fused=True, found_inf=self.found_inf,
              amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)  # fmt: skip

    def _muon(self, group: dict, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        gradients, means = [p.grad for p in parameters], [self.state[p]["momentum"] for p in parameters]
        new_means = torch._foreach_lerp(means, gradients, 1 - MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, new_means, MOMENTUM))  # Nesterov's momentum
        axis = 1 + group["out_axis"]
        outputs_first = ahead.transpose(1, axis)
        steps = orthogonal(outputs_first.flatten(2))  # (N, rows, columns)
        size = group["lr"] * ROOT_MEAN_SQUARE * math.sqrt(max(steps.shape[1:]))
        steps = steps.view(outputs_first.shape).transpose(1, axis)
        decay = 1 - group["lr"] * group["weight_decay"]
        for parameter, mean, new_mean, step in zip(parameters, means, new_means, steps, strict=True):
            self._set(mean, new_mean)
            self._set(parameter, parameter * decay - size * step)

    def _set(self, old: torch.Tensor, new: torch.Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf == 0, new, old))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each of the matrices (N, rows, columns) into 0.68 ... 1.21 and keep its vectors.

    Five iterations of a polynomial of degree 5 (Jordan et al. 2024) do so with all singular values that are at least
    0.002 of the Frobenius norm; smaller ones become up to 3.4445^5 = 485 times as large as they were beside it.
    """
    a, b, c = COEFFICIENTS
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if wide is not matrices else x
