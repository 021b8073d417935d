"""LoRA on the denoiser, with the policy and the reference as two states of one network.

The adapters are on: the policy. They are off: the reference, bit for bit the base model. Or a frozen adapter is on in
their place: a reference that is not the base.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_dpo.adapted_layers import CLASSES, MAGNITUDE, POLICY, REFERENCE, Adapted, Switch
from lora_dpo.errors import LoraDpoError, UserError
from lora_dpo.randomness import torch_generator

INITIAL_WEIGHTS = "initial adapter weights"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Of the ResNets and the layers between resolutions. Not conv_in and conv_out: with 4 channels on one side, they have no
# use for a rank above 4.
_CONV = r"re:.*\.(resnets\.\d+\.(conv1|conv2|conv_shortcut)|(down|up)samplers\.\d+\.conv)"
_PLAIN: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+ff": (*_ATTENTION, "ff.net.0.proj", "ff.net.2"),
    "all-linear": ("all-linear",),
}
PRESETS = _PLAIN | {f"{name}+conv": (*targets, _CONV) for name, targets in _PLAIN.items()}
ALL_LINEAR = "all-linear"
PATTERN = "re:"


class Adapters:
    """One LoRA per target layer of a frozen denoiser; made by `attach`.

    Attributes:
        rank, alpha: as they were asked for.
        scale: the update of a layer is scale·B·A; see `scale_of`.
        layers: the LoRA layers by module name, sorted.
    """

    def __init__(
        self, denoiser: nn.Module, layers: dict[str, Adapted], rank: int, alpha: float, rslora: bool = False
    ) -> None:
        self.rank, self.alpha, self.layers = rank, alpha, layers
        self.scale = scale_of(rank, alpha, rslora)
        self._denoiser, self._switch = denoiser, Switch()
        self._reference: str | None = None
        for layer in layers.values():
            layer.switch = self._switch

    @staticmethod
    def attach(
        denoiser: nn.Module,
        *,
        rank: int,
        alpha: float,
        targets: str | Sequence[str] = "attention",
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        seed: int,
        init: Literal["gaussian", "kaiming"] = "gaussian",
    ) -> Adapters:
        r"""Freeze `denoiser` and put adapters into its target layers, with B = 0: the policy starts as the reference.

        A is a function of (seed, layer name) alone: N(0, 1/rank²), or uniform in ±1/√fan_in for "kaiming". The
        global random state is left as it was. Weights are float32 whatever the base's precision, so that small
        updates aren't lost; a layer's output keeps the base's precision.

        Args:
            targets: one of `PRESETS`, or module name endings ("to_q", "attn2.to_k") and patterns for whole names
                (`re:up_blocks\.1\..*\.to_[qkv]`).
            rslora: scale by alpha / √rank (Kalajdzievski 2023): updates of large ranks aren't held back.
            dora: learn the length of each output's weights too, apart from their direction (Liu et al. 2024).
            dropout: on the adapters' input, in training passes only.

        Raises:
            UserError: a target that no linear or convolution layer has; for DoRA, an output whose weights are all zero.
        """
        if any(isinstance(module, LoraLayer) for module in denoiser.modules()):
            raise LoraDpoError("the denoiser has adapters already; detach them first")
        names = target_names(denoiser, targets)
        # `lora_alpha` is the alpha itself; peft divides by the rank.
        options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}
        config = LoraConfig(target_modules=names, bias="none", **options)
        config._register_custom_module(CLASSES)
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, denoiser, adapter_name=POLICY)
        layers = {name: m for name, m in sorted(denoiser.named_modules()) if isinstance(m, Adapted)}
        if set(layers) != set(names):
            raise LoraDpoError(f"peft adapted other layers than asked for: {sorted(set(layers) ^ set(names))[:8]}")
        adapters = Adapters(denoiser, layers, rank, alpha, rslora)
        for name, parameter in adapters.parameters().items():
            parameter.data = _initial(name, parameter, rank, init, seed).to(parameter.device)
        if dora:
            adapters.decompose()
        adapters.train(False)
        return adapters

    def decompose(self) -> None:
        """Make the layers DoRA's, with the magnitudes that leave the policy what it is; those they had are lost.

        Raises:
            UserError: an output of the base has no weights but zeros.
        """
        for name, layer in self.layers.items():
            try:
                layer.decompose()
            except UserError as error:
                raise UserError(f"{name}: {error.what}", where="adapter.dora", hint=error.hint) from None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable weights, float32, ordered by name (`….to_q.lora_A.weight`, without the adapter's name).

        With DoRA also `….to_q.lora_magnitude_vector`.
        """
        return {
            f"{name}.{end}": weight for name, layer in self.layers.items() for end, weight in layer.weights().items()
        }

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The reference inside the scope: adapters off, or those of `keep_as_reference`; without dropout.

        The policy is restored on exceptions; scopes may be nested. `backward()` of a policy pass must not run in here:
        under gradient checkpointing it repeats the forward pass, and would repeat it as the reference.
        """
        before, self._switch.active = self._switch.active, self._reference
        try:
            yield
        finally:
            self._switch.active = before

    @property
    def in_reference(self) -> bool:
        """Whether a `reference` scope is open."""
        return self._switch.active != POLICY

    def keep_as_reference(self) -> None:
        """From now on the adapter as it is now is the reference, instead of the base; `state_dict` is without it."""
        for layer in self.layers.values():
            layer.keep_as(REFERENCE)
        self._reference = REFERENCE

    def reference_weights(self) -> dict[str, Tensor]:
        """Of the adapter that is the reference, named as in `parameters`, without scale; empty if it is the base."""
        if (kept := self._reference) is None:
            return {}
        layers = self.layers.items()
        return {f"{name}.{part}": weight for name, layer in layers for part, weight in layer.weights(kept).items()}

    def train(self, mode: bool = True) -> None:
        """Adapter dropout on or off; it must stay on until `backward()` is over (gradient checkpointing)."""
        for layer in self.layers.values():
            layer.lora_dropout.train(mode)

    @property
    def is_dora(self) -> bool:
        return any(MAGNITUDE in layer.weights() for layer in self.layers.values())

    @property
    def has_dropout(self) -> bool:
        return any(isinstance(layer.lora_dropout[POLICY], nn.Dropout) for layer in self.layers.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU, named as in `parameters`."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy weights in; every name and shape must be the same, else nothing is changed.

        Raises:
            UserError: names that are missing or too many, or shapes that differ.
        """
        own = self.parameters()
        problems = [f"missing: {name}" for name in own if name not in state]
        problems += [f"unexpected: {name}" for name in state if name not in own]
        problems += [
            f"{name}: shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise UserError(
                f"these weights don't fit the adapter ({'; '.join(problems[:8])}{more})",
                hint="use the base model, rank and targets that they were trained with",
            )
        for name, parameter in own.items():
            parameter.data.copy_(state[name])

    @torch.no_grad()
    def norm(self) -> float:
        """‖ΔW‖: Frobenius norm over all layers of what the policy adds to the base's weights; 0 at the start."""
        squares = torch.stack([layer.squared_change() for layer in self.layers.values()])
        return math.sqrt(max(squares.sum().item(), 0.0))

    def detach(self) -> None:
        """Take the adapters out; the denoiser is the plain base again. Their weights stay readable here."""
        for name, layer in self.layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self._denoiser.get_submodule(parent), child, layer.base_layer)
        self._denoiser.__dict__.pop("peft_config", None)


def scale_of(rank: int, alpha: float, rslora: bool = False) -> float:
    """What B·A is multiplied by: alpha / rank, or alpha / √rank for rank-stabilised LoRA."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def target_names(denoiser: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the linear and convolution layers that `targets` selects, in module order.

    Raises:
        UserError: an unknown preset, a malformed pattern, or a target that matches no such layer.
    """
    known = {name: m for name, m in denoiser.named_modules() if name and isinstance(m, (nn.Linear, nn.Conv2d))}
    if isinstance(targets, str):
        if targets not in PRESETS:
            raise UserError(
                f'unknown preset "{targets}"',
                where="adapter.targets",
                hint=f"presets: {', '.join(PRESETS)}; or give a list of module name endings and re:patterns",
            )
        targets = PRESETS[targets]
    chosen = {target: _matching(target, known) for target in targets}
    unmatched = [target for target, names in chosen.items() if not names]
    if unmatched or not chosen:
        raise UserError(
            f"no linear or convolution layer is selected by {', '.join(unmatched)}" if chosen else "no targets given",
            where="adapter.targets",
            hint=_suggestion(unmatched, known),
        )
    selected = {name for names in chosen.values() for name in names}
    return [name for name in known if name in selected]


def _matching(target: str, known: Mapping[str, nn.Module]) -> list[str]:
    if target == ALL_LINEAR:
        return [name for name, module in known.items() if isinstance(module, nn.Linear)]
    if not target.startswith(PATTERN):
        return [name for name in known if name == target or name.endswith(f".{target}")]
    try:
        pattern = re.compile(target.removeprefix(PATTERN))
    except re.error as error:
        raise UserError(f"{target} is no regular expression ({error})", where="adapter.targets") from None
    return [name for name in known if pattern.fullmatch(name)]


def _suggestion(unmatched: Sequence[str], known: Mapping[str, nn.Module]) -> str:
    endings = {".".join(name.split(".")[-k:]) for name in known for k in (1, 2, 3)}
    endings = {ending for ending in endings if not ending[0].isdigit()}
    close = [match for ending in unmatched for match in difflib.get_close_matches(ending, endings, n=1)]
    return f"did you mean {', '.join(close)}?" if close else f"try one of {', '.join(sorted(endings)[:12])}"


def _initial(name: str, like: Tensor, rank: int, init: str, seed: int) -> Tensor:
    if name.endswith("lora_B.weight"):
        return torch.zeros(like.shape)
    generator = torch_generator(seed, INITIAL_WEIGHTS, name)
    if init == "gaussian":
        return torch.randn(like.shape, generator=generator, device="cpu") / rank
    bound = 1 / math.sqrt(like[0].numel())
    return (torch.rand(like.shape, generator=generator, device="cpu") * 2 - 1) * bound
