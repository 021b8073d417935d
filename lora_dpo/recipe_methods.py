"""The answers to `method.kind =`, each with its keys. A key means the same, with one default, in all that have it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lora_dpo.recipe_fields import Above0, AtLeast0, Count, Positive, Section

FlipRate = Annotated[float, Field(ge=0, lt=0.5)]
BETA: Any = Field(default=2000.0, description="the published code's β: errors are means over c, h, w, ½ in front")


class Draws(Section):
    timestep_range: Annotated[tuple[Count, Positive], Field(strict=False)] | None = Field(
        default=None, description="[low, high]: timesteps are uniform in low … high − 1; default: all"
    )
    timestep_sampling: Literal["uniform", "stratified"] = Field(
        default="uniform", description="stratified: the timesteps of a step's pairs are spread evenly over the range"
    )
    visits_per_pair: Positive | None = Field(default=None, description="bounds the distinct (t, ε) draws of a pair")


class Compared(Draws):
    """What holds the policy against a frozen reference."""

    reference: Literal["base", "adapter"] = Field(
        default="base", description="what the policy stays near: the base, or the adapter that it starts from"
    )


class OfErrors(Compared):
    """What every objective can have that takes the reference's errors, and nothing else, from it."""

    reference_cache: bool = Field(
        default=False, description="store the reference's errors, for later epochs and other runs; with visits_per_pair"
    )


class OfMargin(OfErrors):
    """What every loss of the margin u can have beside it."""

    beta: Above0 | Literal["auto"] = BETA
    timestep_weight: Literal["constant", "elbo", "min_snr"] = Field(
        default="constant", description="w(t) of the margin, of mean 1"
    )
    min_snr_gamma: Above0 | None = Field(default=None, description="γ of min_snr; default: 5")
    safeguard: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="share of a winner's progress that its loser may not undo; default: not watched"
    )
    anchor_weight: AtLeast0 = Field(default=0.0, description="of what a winner's error is above the reference's")
    sft_weight: AtLeast0 = Field(default=0.0, description="of a winner's error")


class Dpo(OfMargin):
    """Diffusion-DPO (Wallace et al. 2023, eq. 14); with smoothing cDPO, with noise robust DPO."""

    kind: Literal["dpo"]
    label_smoothing: FlipRate = Field(default=0.0, description="labels are right with probability 1 − this (cDPO)")
    label_noise: FlipRate = Field(default=0.0, description="share of labels that are wrong, corrected for (robust DPO)")


class Ipo(OfMargin):
    """IPO (Azar et al. 2023)."""

    kind: Literal["ipo"]


class Hinge(OfMargin):
    """The hinge of SLiC (Zhao et al. 2023)."""

    kind: Literal["hinge"]


class Dmpo(OfMargin):
    """DMPO (Li et al. 2025)."""

    kind: Literal["dmpo"]
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = Field(default=0.01, description="smoothing of its target")


class Kto(OfErrors):
    """Diffusion-KTO (Li et al. 2024): winners are desirable images, losers undesirable ones, each on its own."""

    kind: Literal["kto"]
    beta: Above0 = BETA
    desirable_weight: Above0 = Field(default=1.0, description="λ of winners")
    undesirable_weight: Above0 = Field(default=1.0, description="λ of losers")


class Mapo(Draws):
    """MaPO (Hong et al. 2024), without a reference."""

    kind: Literal["mapo"]
    odds_weight: Above0 = Field(default=0.1, description="the paper's β, the weight of winner against loser")
    odds_scale: Above0 = Field(default=0.5, description="s of φ(e) = s·e/(exp(s·e) − 1)")


class Dspo(Compared):
    """DSPO (Zhu et al. 2025)."""

    kind: Literal["dspo"]
    beta: Above0 = BETA
    strength: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.001, description="how far targets move away from the reference"
    )


class Sft(Draws):
    """Supervised fine-tuning on the winners."""

    kind: Literal["sft"]


Method = Dpo | Ipo | Hinge | Dmpo | Kto | Mapo | Dspo | Sft
METHODS: dict[str, type[Section]] = {
    "dpo": Dpo, "ipo": Ipo, "hinge": Hinge, "dmpo": Dmpo, "kto": Kto, "mapo": Mapo, "dspo": Dspo, "sft": Sft
}  # fmt: skip
OF_MARGIN = [kind for kind, model in METHODS.items() if issubclass(model, OfMargin)]
# Known, implemented as functions, and refused for training.
REFUSED = {
    "alternative": "the alternative objective of the supplement's section S2 has a gradient of exactly zero where "
    "policy and reference agree, and a LoRA starts there: it would never move (docs/objectives.md)"
}
