"""The engine of every objective on pairs: passes through the network in, the objective's scalars out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from lora_dpo import denoising
from lora_dpo.adapters import Adapters
from lora_dpo.denoising import ErrorSpace
from lora_dpo.families import Family
from lora_dpo.methods import LossParts, Method, PassScope
from lora_dpo.methods.objectives import Objective, PairErrors
from lora_dpo.methods.stream import Images, PairStream, Part, Side, StepBatch
from lora_dpo.reference_cache import ReferenceErrors

PairPass = Literal["plain", "split"]
_WITH_GRADIENT = ("", "shift_")


@final
class PairMethod(Method):
    """An objective on a stream of pairs; its reference is `Adapters.reference`.

    Args:
        error_space: what an error means for v-prediction; see `denoising.errors`.
        timestep_weights: w(t) of `PairErrors.weight` for each t; None: 1. See `losses.timestep_weights`.
        pair_pass: of `backward`. "plain": all images of a part in one pass. "split": one image at a time, whatever the
            part's size; the gradient is the same to rounding, with one image's activations. See `_split`.
        references: the reference's errors that are known already; those that aren't are computed and kept, each pair in
            passes of its own: `reference_composition`. So they don't depend on the part in which they are first met.
            Only for what `can_be_stored`.
    """

    def __init__(
        self,
        stream: PairStream,
        family: Family,
        adapters: Adapters,
        objective: Objective,
        *,
        error_space: ErrorSpace = "epsilon",
        timestep_weights: Float[Tensor, " T"] | None = None,
        pair_pass: PairPass = "plain",
        references: ReferenceErrors | None = None,
    ) -> None:
        if references is not None and not can_be_stored(objective):
            raise ValueError("the reference's errors are not what this objective needs of it, or not all")
        self._stream, self._family, self._adapters = stream, family, adapters
        self._first = self.objective = objective
        self._error_space: ErrorSpace = error_space
        self._timestep_weights = timestep_weights
        self._pair_pass: PairPass = pair_pass
        self._references = references

    def batches(self, start_step: int) -> Iterator[StepBatch]:
        return self._stream.batches(start_step)

    def restart(self, lines: Sequence[Mapping[str, float]]) -> None:
        self.objective = self._first
        for line in lines:
            self.see(line)

    def see(self, line: Mapping[str, float]) -> None:
        self.objective = self.objective.after(line)

    def loss(self, part: Part) -> LossParts:
        """Winners and losers go through the network together, the reference first: its activations are gone by then.

        Sums: loss; error_winner; where they are needed, error_loser, ref_error_winner, ref_error_loser, shift_winner,
        shift_loser and overlap; where the objective has a margin u, margin, implicit_accuracy (its sign; ties half) and
        gradient_factor (σ(−u): of DPO's gradient, what is left); what the objective logs itself; and with stored
        reference errors reference_passes, the pairs for which they had to be computed.
        """
        images = part.images(*self._sides)
        stored = self._stored(part, nullcontext)
        reference = self._reference(images, nullcontext)
        with part.dropout(self._adapters):
            residual = denoising.residuals(self._family, *images)
        found = self._measure(images, residual, reference)
        measured = {
            f"{name}{side}": value
            for name, values in found.items()
            for side, value in zip(self._sides, values.split(len(part)), strict=True)
        }
        return self._evaluate(part, measured, residual.detach().split(len(part)), stored)

    def backward(self, part: Part, pass_scope: PassScope = nullcontext) -> LossParts:
        if self._pair_pass == "plain":
            return super().backward(part, pass_scope)
        pairs = [self._split(part.pair(place), pass_scope) for place in range(len(part))]
        return LossParts(
            loss=torch.stack([pair.loss for pair in pairs]).sum(),
            per_pair=torch.cat([pair.per_pair for pair in pairs]),
            sums={name: torch.stack([pair.sums[name] for pair in pairs]).sum() for name in pairs[0].sums},
        )

    def _split(self, pair: Part, pass_scope: PassScope) -> LossParts:
        """Adds one pair's gradient, one image at a time, in as many forward and backward passes as the plain way.

        How much each image weighs, ∂loss/∂e_w and ∂loss/∂e_l, is known only when both have been through the network.
        But the gradient of an error itself can be taken before, and with LoRA it is small: the winner's is computed and
        set aside, and is weighed when the loser has been measured. A shift's gradient takes a backward pass of its own.
        """
        parameters = list(self._adapters.parameters().values())
        measured: dict[str, Tensor] = {}
        residuals: list[Tensor] = []
        aside: dict[str, list[Tensor | None]] = {}
        factor = torch.ones(())
        stored = self._stored(pair, pass_scope)
        for side in self._sides:
            images = pair.images(side)
            reference = self._reference(images, pass_scope)
            with pass_scope(), pair.dropout(self._adapters, side):
                residual = denoising.residuals(self._family, *images)
                found = self._measure(images, residual, reference)
            residuals.append(residual.detach())
            measured |= {f"{name}{side}": value for name, value in found.items()}
            if side != self._sides[-1]:
                factor = self._usual_weight(pair, found[""])
                of_gradients = [name for name in _WITH_GRADIENT if name in found]
                for name in of_gradients:
                    keep_graph = name != of_gradients[-1]
                    aside[f"{name}{side}"] = _gradients(parameters, found[name] * factor, keep_graph=keep_graph)
        leaves = {name: value.detach().requires_grad_(not name.startswith("ref_")) for name, value in measured.items()}
        parts = self._evaluate(pair, leaves, residuals, stored)
        parts.loss.backward()
        weights = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        now = [name for name in weights if name not in aside]
        torch.autograd.backward([measured[name] for name in now], [weights[name] for name in now])
        for name in aside:
            if name in weights:
                _add(parameters, aside[name], weights[name][0] / factor)
        return LossParts(parts.loss.detach(), parts.per_pair, parts.sums)

    def _usual_weight(self, pair: Part, error: Tensor) -> Float[Tensor, ""]:
        """∂loss/∂e_w where winner, loser, policy and reference are equally wrong; 1 if there is none.

        The winner's gradient is computed times this, which is divided out later: with the plain pass's magnitude it
        keeps the plain pass's precision in float16.
        """
        sides = [f"{name}{side}" for name in ("", "ref_") for side in ("winner", "loser")]
        same = {name: error.detach().clone() for name in sides} | {
            f"shift_{side}": torch.zeros_like(error) for side in ("winner", "loser")
        }
        same["winner"].requires_grad_()
        residuals = [torch.ones_like(pair.noise)] * 2
        (weight,) = torch.autograd.grad(self._evaluate(pair, same, residuals).loss, same["winner"], allow_unused=True)
        if weight is None:
            return torch.ones_like(error[0])
        return torch.where((weight != 0) & weight.isfinite(), weight, 1.0)[0]

    @property
    def _sides(self) -> tuple[Side, ...]:
        return ("winner", "loser") if "loser" in self.objective.needs else ("winner",)

    def _reference(self, images: Images, pass_scope: PassScope) -> Float[Tensor, "b c h w"] | None:
        """The reference's residuals, where anything of it is needed that isn't stored."""
        if self._references is not None or not self.objective.needs & {"reference", "shift"}:
            return None
        return self._reference_pass(images, pass_scope)

    def _reference_pass(self, images: Images, pass_scope: PassScope) -> Float[Tensor, "b c h w"]:
        with torch.no_grad(), pass_scope(), self._adapters.reference():
            return denoising.residuals(self._family, *images)

    def _stored(self, part: Part, pass_scope: PassScope) -> _Stored | None:
        """The reference's errors, from the store, or computed and put there."""
        if self._references is None:
            return None
        places = list(zip(part.indices, part.visits, strict=True))
        found = self._references.read(places)[:, : len(self._sides)]
        unknown = found.isnan().any(dim=1).nonzero().flatten().tolist()
        if unknown:
            together = reference_composition(self.objective, self._pair_pass) == "pair"
            passes: list[tuple[Side, ...]] = [self._sides] if together else [(side,) for side in self._sides]
            computed = []
            for place in unknown:
                for sides in passes:
                    images = part.pair(place).images(*sides)
                    reference = self._reference_pass(images, pass_scope)
                    computed.append(self._mean_square(images, reference))
            found[unknown] = torch.cat(computed).view(len(unknown), -1).cpu()
            finite = [place for place in unknown if found[place].isfinite().all()]
            whole = torch.full((len(finite), 2), math.nan)
            whole[:, : len(self._sides)] = found[finite]
            self._references.write([places[place] for place in finite], whole)
        columns = found.to(part.noise.device).unbind(dim=1)
        errors = {f"ref_{side}": column for side, column in zip(self._sides, columns, strict=True)}
        return _Stored(errors, torch.tensor(float(len(unknown)), device=part.noise.device))

    def _measure(
        self, images: Images, residual: Float[Tensor, "b c h w"], reference: Float[Tensor, "b c h w"] | None
    ) -> dict[str, Float[Tensor, " b"]]:
        """By the beginnings of the names in `PairErrors`."""
        measured = {"": self._mean_square(images, residual)}
        if reference is not None and "reference" in self.objective.needs:
            measured["ref_"] = self._mean_square(images, reference)
        if reference is not None and "shift" in self.objective.needs:
            measured["shift_"] = self._mean_square(images, residual - reference)
        return measured

    def _mean_square(self, images: Images, one: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        return denoising.mean_product(self._family, one, one, images.t, self._error_space)

    def _evaluate(
        self,
        part: Part,
        measured: Mapping[str, Float[Tensor, " pair"]],
        residuals: Sequence[Tensor],
        stored: _Stored | None = None,
    ) -> LossParts:
        """The objective of what was measured.

        Args:
            residuals: detached, of winners and losers.
        """
        found = dict(measured) | (stored.errors if stored is not None else {})
        if "overlap" in self.objective.needs:
            winner, loser = residuals
            found["overlap"] = denoising.mean_product(self._family, winner, loser, part.t, self._error_space)
        weight = torch.ones_like(found["winner"], requires_grad=False)
        if self._timestep_weights is not None:
            weight = self._timestep_weights.to(part.t.device)[part.t].to(weight)
        errors = PairErrors(t=part.t, weight=weight, label=part.label, **found)
        per_pair = self.objective(errors)
        sums = _sums(self.objective, errors, per_pair)
        if stored is not None:
            sums["reference_passes"] = stored.passes
        return LossParts(per_pair.sum() / part.batch_pairs, per_pair.detach(), sums)


class _Stored(NamedTuple):
    """The reference's errors by their names in `PairErrors`, and for how many pairs they were computed now."""

    errors: dict[str, Float[Tensor, " pair"]]
    passes: Float[Tensor, ""]


def can_be_stored(objective: Objective) -> bool:
    """Whether the reference's errors are all that the objective needs of it."""
    return "reference" in objective.needs and "shift" not in objective.needs


def reference_composition(objective: Objective, pair_pass: PairPass) -> Literal["pair", "image"]:
    """What goes through the network at a time for a reference error that is stored: as for one pair's policy.

    Kernels round differently for another batch size, so that this is a part of what a stored error depends on.
    """
    return "pair" if pair_pass == "plain" and "loser" in objective.needs else "image"


def _gradients(parameters: Sequence[Tensor], value: Tensor, *, keep_graph: bool) -> list[Tensor | None]:
    """∂value/∂parameters, by `backward`, which every kind of checkpointing knows; their own gradients stay."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    value.sum().backward(retain_graph=keep_graph)
    found = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return found


def _add(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], weight: Float[Tensor, ""]) -> None:
    """Add weight·gradients to the parameters' gradients; `gradients` are used up."""
    new = [gradient for gradient in gradients if gradient is not None]
    torch._foreach_mul_(new, weight)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


@torch.no_grad()
def _sums(objective: Objective, errors: PairErrors, per_pair: Tensor) -> dict[str, Tensor]:
    logged = {"loss": per_pair}
    margin = objective.margin(errors)
    if margin is not None:
        right = 0.5 * (torch.sign(margin) + 1)
        accuracy = errors.label * right + (1 - errors.label) * (1 - right)
        logged |= {"implicit_accuracy": accuracy, "margin": margin}
    names = {"winner": "error_winner", "loser": "error_loser"}
    names |= {f"ref_{side}": f"ref_{name}" for side, name in names.items()}
    names |= {name: name for name in ("shift_winner", "shift_loser", "overlap")}
    logged |= {named: errors.measured[name] for name, named in names.items() if name in errors.measured}
    if margin is not None:
        logged["gradient_factor"] = torch.sigmoid(-margin)
    logged |= objective.logged(errors)
    return {name: value.detach().sum() for name, value in logged.items()}
