"""Adapters: small trainable parameters beside a frozen base, by Hugging Face's peft."""

from ditty_di.adapters.inject import apply_adapter
from ditty_di.adapters.state import adapter_config, adapter_state
from ditty_di.adapters.values import initialize

__all__ = ["adapter_config", "adapter_state", "apply_adapter", "initialize"]
