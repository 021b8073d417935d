"""How annotations are checked at run time while testing; `conftest.py` puts it on the whole package."""

from __future__ import annotations

import io
from typing import TextIO

from beartype import BeartypeConf, FrozenDict, beartype

checked = beartype(
    conf=BeartypeConf(
        # An int is a float, as PEP 484 says and as every type checker has it.
        is_pep484_tower=True,
        # pytest's captured streams lack some of TextIO's attributes.
        hint_overrides=FrozenDict({TextIO: io.IOBase}),
    )
)
