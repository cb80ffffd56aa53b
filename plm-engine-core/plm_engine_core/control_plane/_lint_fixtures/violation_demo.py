"""A module that keeps every import contract.

The negative tests put a sibling with a forbidden import beside it, in a copy of the package, and expect the contract to
break there and nowhere else.
"""
