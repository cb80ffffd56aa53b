"""The control plane decides; the agent runtime runs."""
