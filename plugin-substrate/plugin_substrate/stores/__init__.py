"""What a host keeps about plugins between its starts: each a small protocol with a file and an in-memory form."""
