"""A sandbox for the negative tests of the import contracts; not part of the product and not shipped."""
