"""The adapter as a file that stock diffusers loads, and the proof that it does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lora_dpo import atomic
from lora_dpo.adapters import Adapters
from lora_dpo.cache import CachedPairs
from lora_dpo.errors import LoraDpoError
from lora_dpo.families import Conditioning, Family
from lora_dpo.families.files import errors_only
from lora_dpo.methods.stream import PairStream
from lora_dpo.randomness import seed_of

FILE = "pytorch_lora_weights.safetensors"
PREFIX = "unet"
LOADED_NAME = "lora_dpo"
PROBE = "adapter verification"
TOLERANCE = {torch.float32: 1e-5}
COARSE_TOLERANCE = 3e-2


def save(adapters: Adapters, directory: Path | str, metadata: Mapping[str, str]) -> Path:
    """Write `pytorch_lora_weights.safetensors` in diffusers' layout, float32.

    The scale (alpha / rank) is multiplied into B, so that W + B·A is the adapted weight for every loader, also for
    those that know no alpha.

    Args:
        metadata: strings for the file's header.

    Raises:
        UserError: disk full or directory not writable.
    """
    scale = adapters.scale
    state = {
        f"{PREFIX}.{name}": weight * scale if ".lora_B." in name else weight
        for name, weight in adapters.state_dict().items()
    }
    return write(state, Path(directory) / FILE, metadata)


def write(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """Write tensors as one safetensors file, complete or not at all; UserError if that can't be done.

    The same tensors and strings give the same bytes.
    """
    data = safetensors.torch.save(dict(state), metadata={"format": "pt", **metadata})
    with atomic.clear_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.replace(path, _in_order(data))
    return path


def _in_order(data: bytes) -> bytes:
    """The library writes the header's strings in an order that changes from call to call; here they are sorted."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # the format aligns what follows
    return len(header).to_bytes(8, "little") + header + data[end:]


@dataclass(frozen=True)
class Probe:
    """Fixed inputs of the denoiser."""

    x_t: Float[Tensor, "b c h w"]
    t: Int[Tensor, " b"]
    conditioning: Conditioning


def probe(pairs: CachedPairs, family: Family, *, count: int = 2, seed: int = 0) -> Probe:
    """Noised winners of the first pairs that have the first one's size.

    Timesteps and noise depend on nothing but `seed` and the pairs.
    """
    alike = (index for index in range(len(pairs)) if pairs.size(index) == pairs.size(0))
    indices = list(islice(alike, count))
    stream = PairStream(pairs, family, seed=seed_of(seed, PROBE), batch_pairs=len(indices))
    part = stream.part(indices, [0] * len(indices), batch_pairs=len(indices))
    x_t = family.schedule.add_noise(part.x_0_winner, part.noise, part.t)
    return Probe(x_t, part.t, part.conditioning_winner)


@dataclass(frozen=True)
class Verification:
    """Largest differences of predictions, absolute.

    Attributes:
        difference: policy in memory against the file in stock diffusers.
        effect: policy against the base model; 0 for an adapter that was never trained.
    """

    difference: float
    effect: float
    tolerance: float


@torch.no_grad()
def verify(
    adapters: Adapters,
    family: Family,
    path: Path | str,
    probe: Probe,
    *,
    adapter_name: str = LOADED_NAME,
    tolerance: float | None = None,
) -> Verification:
    """Put the file's adapter in the place of the one in memory, through the stock pipeline, and compare predictions.

    Afterwards `adapters` are detached and `family.pipeline()` has the loaded ones, on, under `adapter_name`:
    `enable_lora()` and `disable_lora()` switch them.

    Args:
        tolerance: relative to the largest prediction if that is above 1; None: 1e-5 for a float32 base, 3e-2 for
            others, whose adapters diffusers rounds to the base's precision.

    Raises:
        LoraDpoError: predictions differ by more than the tolerance, or aren't finite.
    """
    policy = predict(family, probe)
    adapters.detach()
    base = predict(family, probe)
    return verify_file(family, path, probe, policy=policy, base=base, adapter_name=adapter_name, tolerance=tolerance)


@torch.no_grad()
def verify_file(
    family: Family,
    path: Path | str,
    probe: Probe,
    *,
    policy: Tensor,
    base: Tensor,
    adapter_name: str = LOADED_NAME,
    tolerance: float | None = None,
) -> Verification:
    """As `verify`, against predictions made before.

    Args:
        policy, base: of the probe, with the adapter and without.
    """
    path, pipeline = Path(path), family.pipeline()
    with errors_only():  # it warns that the text encoders have no adapters
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=adapter_name, local_files_only=True)
    loaded = predict(family, probe)
    tolerance = tolerance_for(family, policy, tolerance)
    difference, effect = ((policy - other).abs().max().item() for other in (loaded, base))
    if not difference <= tolerance:
        raise LoraDpoError(
            f"{path}: reloaded through diffusers, predictions differ from the trained adapter's by {difference:.3g} "
            f"(tolerance {tolerance:.3g}; the adapter itself changes them by {effect:.3g})\n"
            "  → the checkpoints are intact; please report this with your diffusers and peft versions"
        )
    return Verification(difference, effect, tolerance)


def tolerance_for(family: Family, prediction: Tensor, relative: float | None = None) -> float:
    """How far predictions of the same adapter may be apart; see `verify`."""
    if relative is None:
        relative = TOLERANCE.get(next(family.denoiser.parameters()).dtype, COARSE_TOLERANCE)
    return relative * max(1.0, prediction.abs().max().item())


def predict(family: Family, probe: Probe) -> Tensor:
    """The denoiser's prediction for the probe, in float32, with whatever adapters are on."""
    return family.predict(probe.x_t, probe.t, probe.conditioning).float()
