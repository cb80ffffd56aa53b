"""`plm-cli demo`: one governed run from end to end, over HTTP, on real input."""
