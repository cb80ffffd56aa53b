"""Admission and settlement: the two doors between deciding and doing. `control_plane` itself exports what they offer."""

__all__: list[str] = []
