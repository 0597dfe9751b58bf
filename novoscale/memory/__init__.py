"""Memory, counted exactly: what an optimizer really holds on this rank."""

from novoscale.memory.accounting import Account, LayerBytes, StateBytes, account, optimizer_state_bytes

__all__ = ["Account", "LayerBytes", "StateBytes", "account", "optimizer_state_bytes"]
