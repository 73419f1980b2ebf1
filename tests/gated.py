"""Experts of other forms than Switch's: gated, with and without biases, whose routers choose several."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import silu

from msmoe.calibration.stats import LayerStats
from msmoe.layer.expert import RELU, Activation, Expert
from msmoe.layer.routing import Router, Routing
from msmoe.layer.tokens import TokenSample

SWIGLU = Activation("silu", lambda gate, up: silu(gate) * up, scales="up", is_linear=True)
CLAMPED = Activation("clamped swiglu", lambda gate, up: (up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate))
FORMS = {  # roles of the input side, whether the output has a bias, activation
    "relu": (("wi",), False, RELU),
    "swiglu": (("gate", "up"), False, SWIGLU),
    "biased swiglu": (("gate", "gate_bias", "up", "up_bias"), True, SWIGLU),
    "gpt-oss": (("gate", "up", "gate_bias", "up_bias"), True, CLAMPED),
}


def random_expert(form: str, seed: int = 0, *, f: int = 12, d: int = 7, dtype: torch.dtype = torch.float32) -> Expert:
    """An expert of a form with F = f neurons and D = d."""
    roles, has_output_bias, activation = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    inputs = {role: randn(f) if role.endswith("_bias") else randn(f, d) for role in roles}
    return Expert(inputs, randn(d, f), randn(d) if has_output_bias else None, activation)


def random_inputs(count: int = 200, *, d: int = 7, seed: int = 99, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Correlated tokens away from zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (torch.randn(count, d, generator=generator, dtype=torch.float64) @ mix / d**0.5 + 0.3).to(dtype)


def random_order(seed: int, f: int = 12) -> torch.Tensor:
    return torch.randperm(f, generator=torch.Generator().manual_seed(seed))


def near(expert: Expert, seed: int, noise: float) -> Expert:
    """An expert of the same form, a little off."""
    generator = torch.Generator().manual_seed(seed)
    return expert.map(lambda t: t + noise * torch.randn(t.shape, generator=generator).to(t.dtype))


def assert_same_weights(left: Expert, right: Expert, **tolerance) -> None:
    assert left.weights.keys() == right.weights.keys()
    for role, weight in left.weights.items():
        torch.testing.assert_close(
            weight, right.weights[role], msg=lambda text, role=role: f"{role}: {text}", **tolerance
        )


@dataclass(frozen=True)
class SoftmaxTopK:
    """A router of several experts: the largest logits, at their softmax probabilities."""

    rows: torch.Tensor
    top_k: int = 2

    @property
    def num_experts(self) -> int:
        return len(self.rows)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.rows.T

    def __call__(self, inputs: torch.Tensor) -> Routing:
        weights, experts = self.logits(inputs).softmax(-1).topk(min(self.top_k, len(self.rows)))
        return Routing(experts, weights)

    def keeping(self, rows: Sequence[int]) -> "SoftmaxTopK":
        return replace(self, rows=self.rows[list(rows)])

    def equals(self, other: Router) -> bool:
        return isinstance(other, SoftmaxTopK) and torch.equal(self.rows, other.rows)


def layer_stats(router: SoftmaxTopK, *, count: int = 400) -> LayerStats:
    """Statistics of a layer from random tokens, all in the sample."""
    d, num_experts = router.rows.shape[1], router.num_experts
    x = random_inputs(count, d=d)
    experts, gate = router(x)
    keys = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(1))
    sample = TokenSample(x, experts, gate, torch.arange(count) * 977, keys * 0, keys, x[:, :0], x[:, :0])
    used = torch.bincount(experts.flatten(), minlength=num_experts)
    zeros = torch.zeros(num_experts, d, dtype=torch.float64)
    logits = router.logits(x).double()
    return LayerStats(
        routed=used, dispatched=used, gate_mass=zeros[:, 0], soft_mass=zeros[:, 0],
        router_logits_gram=logits.T @ logits,
        input_sum=zeros, input_abs_sum=zeros, input_square_sum=zeros, sequence_counts=used[None].int(), sample=sample,
        sample_size=count, top_k=router.top_k,
    )  # fmt: skip
