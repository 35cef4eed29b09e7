"""The optimizer Muon: momentum whose matrices are orthogonalised (K. Jordan et al., 2024)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn, optim

MATRIX_RATE = 1 / 6  # of --learning_rate: the 0.12 of SGD becomes 0.02
MATRIX_DECAY = 200  # times --weight_decay: 5e-4 becomes 0.1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, from kellerjordan.github.io/posts/muon
ITERATIONS = 5


class Muon(optim.Optimizer):
    """Momentum, orthogonalised in groups that are marked `orthogonal`; plain SGD in the others.

    A weight [out, ...] of an orthogonal group is stepped as the matrix [out, rest], by its momentum with all singular
    values brought near 1, times sqrt(max(1, out / rest)); its weight decay is decoupled. See
    kellerjordan.github.io/posts/muon. Products are computed in `dtype`.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        dtype: torch.dtype,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(groups, defaults | {"orthogonal": False})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """Change all parameters that have gradients, in place."""
        for group in self.param_groups:
            step_one = self._step_matrix if group["orthogonal"] else self._step_vector
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step_one(parameter, group)

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        # Input channels last: a view where the memory is channels_last, and the order of columns makes no difference.
        columns_last = self._momentum(parameter, parameter.grad, group).movedim(1, -1)
        update = orthogonalise(columns_last.flatten(1), self.dtype)
        scale = max(1, len(update) / update.shape[1]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view(columns_last.shape).movedim(-1, 1), alpha=-group["lr"] * scale)

    def _step_vector(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])
        parameter.add_(self._momentum(parameter, gradient, group), alpha=-group["lr"])

    def _momentum(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """The momentum of a parameter after `gradient`, or Nesterov's look ahead from it."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        return gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix [rows, columns] of the same singular vectors, singular values about 0.7 to 1.2, by Newton and Schulz.

    Directions of singular values below a thousandth of the largest stay smaller. A matrix of zeros stays so.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    result = (wide / wide.norm().clamp(min=1e-7)).to(dtype)
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = result @ result.T
        gram = torch.addmm(gram, gram, gram, beta=second, alpha=third)
        result = torch.addmm(result, gram, result, beta=first)
    return (result if wide is matrix else result.T).to(matrix.dtype)


def muon_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, norm_weight_decay: bool
) -> list[dict[str, Any]]:
    """The parameters of `model` as groups for `Muon`: output layer, vectors, and all other weights as matrices.

    The output layer is the last nn.Linear; vectors are the parameters of one dimension. Both get SGD at
    `learning_rate`, matrices MATRIX_RATE of it and MATRIX_DECAY times the weight decay.
    """
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    output = linear[-1:]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    matrices = [
        weight for weight in model.parameters() if weight.dim() > 1 and all(weight is not one for one in output)
    ]
    matrix_rule = {"lr": MATRIX_RATE * learning_rate, "weight_decay": MATRIX_DECAY * weight_decay, "orthogonal": True}
    vector_rule = {} if norm_weight_decay else {"weight_decay": 0.0}
    return [{"params": output}, {"params": vectors} | vector_rule, {"params": matrices} | matrix_rule]
