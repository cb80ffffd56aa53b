"""Admission and settlement: the two doors between deciding and doing. `control_plane` exports what they offer."""

__all__: list[str] = []
