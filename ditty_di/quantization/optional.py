"""bitsandbytes, which is an extra."""

from __future__ import annotations

from typing import Any


def require_bitsandbytes() -> Any:
    """The module; ImportError says how to install it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "quantize: this needs bitsandbytes: pip install 'ditty_di[bnb]', or choose "
            "quantize=nf4 or quantize=int8, which do not need it"
        ) from error
    return bitsandbytes
