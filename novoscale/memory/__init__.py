"""Memory, counted exactly: what an optimizer really holds on this rank."""

from novoscale.memory.accounting import StateBytes, optimizer_state_bytes

__all__ = ["StateBytes", "optimizer_state_bytes"]
