"""Where the books are kept: small ports, and the PostgreSQL behind them."""
