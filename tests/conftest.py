"""Every test runs offline, on the CPU, with warnings as errors and the package's shapes checked at run time."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile

# Before anything imports a hub client.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "LORA_DPO_CACHE" not in os.environ:
    # Nothing of the user's is read or written.
    os.environ["LORA_DPO_CACHE"] = tempfile.mkdtemp(prefix="lora-dpo-tests-")
    atexit.register(shutil.rmtree, os.environ["LORA_DPO_CACHE"], ignore_errors=True)

from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

import lora_dpo.fake_device
import lora_dpo.ledger  # noqa: F401
import tests.support.typecheck  # noqa: F401 - the hook looks it up by name

install_import_hook("lora_dpo", "tests.support.typecheck.checked")

# Started in the background of a script, a process ignores Ctrl-C, and so do those that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is not a failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_finish() -> None:
    """What was imported stays: freeing a model's memory walks it each time otherwise, for half a second."""
    gc.collect()
    gc.freeze()
