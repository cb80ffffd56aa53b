"""A plugin module whose import fails."""

raise ImportError("libmissing.so: cannot open shared object file")
