"""An expert: any feed-forward network with one hidden axis, gated or not, with or without biases.

    h = activation(A_1 x + b_1, A_2 x + b_2, ...),    y = output h + output_bias

The neurons of the hidden axis are interchangeable: whatever has one entry per neuron is permuted together.

Shapes: T tokens, F d_ff, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msmoe.layer.stored import BIAS


@dataclass(frozen=True)
class Activation:
    """What an expert makes of its pre-activations, neuron by neuron.

    Attributes:
        name: for messages and files.
        function: pre-activations (T, F), one for each input matrix in the order of `Expert.inputs` -> hidden (T, F).
        scales: the input matrix in which the hidden activation is positively homogeneous: its row times c > 0 gives c
            times the activation. "" where there is none.
        is_linear: whether that also holds for c < 0.
    """

    name: str
    function: Callable[..., Tensor]
    scales: str = ""
    is_linear: bool = False

    def pull_back(self, pre_activations: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
        """Gradients at the pre-activations (T, F) each, of a gradient (T, F) at the hidden activations."""
        with torch.enable_grad():
            leaves = [z.detach().requires_grad_() for z in pre_activations]
            return list(torch.autograd.grad(self.function(*leaves), leaves, gradient))


RELU = Activation("relu", torch.relu, scales="wi")


@dataclass(frozen=True)
class Expert:
    """A feed-forward expert.

    Attributes:
        inputs: role -> (F, D) matrix, in the order in which the activation takes them, and (F,) biases, named as their
            matrix with `_bias`. Switch: `wi`; gated: `gate`, `up`.
        output: (D, F) matrix; output_bias: (D,), or None.
        activation: of the hidden neurons.
    """

    inputs: Mapping[str, Tensor]
    output: Tensor
    output_bias: Tensor | None = None
    activation: Activation = RELU

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The input matrices (F, D) by role."""
        return {role: tensor for role, tensor in self.inputs.items() if tensor.ndim == 2}

    @property
    def front(self) -> Tensor:
        """All input matrices, one below the other (N F, D)."""
        matrices = list(self.matrices.values())
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every weight by role: the inputs in their order, `output`, and `output_bias` if there is one."""
        bias = {} if self.output_bias is None else {"output" + BIAS: self.output_bias}
        return {**self.inputs, "output": self.output, **bias}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every weight, in the order of `weights`."""
        return tuple(self.weights.values())

    @property
    def num_neurons(self) -> int:
        return self.output.shape[1]

    @property
    def features(self) -> list[Tensor]:
        """What belongs to a neuron: (F, D) of each input matrix, (F, D + 1) with its bias, and (F, D) of the output."""
        biases = {role: self.inputs.get(role + BIAS) for role in self.matrices}
        joined = [
            matrix if (bias := biases[role]) is None else torch.cat([matrix, bias[:, None]], dim=1)
            for role, matrix in self.matrices.items()
        ]
        return [*joined, self.output.T]

    @property
    def neurons(self) -> Tensor:
        """(F, N) everything that belongs to a neuron."""
        return torch.cat(self.features, dim=1)

    def pre_activations(self, x: Tensor) -> list[Tensor]:
        """What the activation is applied to, (T, F) for each input matrix, of inputs (T, D)."""
        biases = (self.inputs.get(role + BIAS) for role in self.matrices)
        found = [x @ matrix.T for matrix in self.matrices.values()]
        return [z if bias is None else z + bias for z, bias in zip(found, biases, strict=True)]

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations (T, F) of inputs (T, D)."""
        return self.activation.function(*self.pre_activations(x))

    def read_out(self, hidden: Tensor) -> Tensor:
        """Outputs (T, D) of hidden activations (T, F)."""
        y = hidden @ self.output.T
        return y if self.output_bias is None else y + self.output_bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.read_out(self.hidden(x))

    def permuted(self, order: Tensor) -> Expert:
        """The same function with its hidden neurons in the order `order` (F,)."""
        inputs = {role: tensor[order] for role, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, output=self.output[:, order])

    def with_output(self, output: Tensor, bias: Tensor | None = None) -> Expert:
        """The same hidden neurons read out by another matrix, and bias where one is given."""
        return replace(self, output=output, output_bias=self.output_bias if bias is None else bias)

    def with_front(self, front: Tensor) -> Expert:
        """The same with other input matrices, given one below the other (N F, D)."""
        matrices = dict(zip(self.matrices, front.split(self.num_neurons), strict=True))
        return replace(self, inputs={**self.inputs, **matrices})

    def like(self, tensors: Sequence[Tensor]) -> Expert:
        """An expert of the same form with other weights, in the order of `tensors`."""
        rest = list(tensors)
        inputs = {role: rest.pop(0) for role in self.inputs}
        output = rest.pop(0)
        return replace(self, inputs=inputs, output=output, output_bias=rest.pop(0) if rest else None)

    def map(self, change: Callable[[Tensor], Tensor]) -> Expert:
        """An expert of the same form with every weight changed."""
        return self.like([change(tensor) for tensor in self.tensors])


def switch_expert(wi: Tensor, wo: Tensor) -> Expert:
    """A ReLU expert without biases, y = wo relu(wi x): wi (F, D), wo (D, F)."""
    return Expert({"wi": wi}, wo)
