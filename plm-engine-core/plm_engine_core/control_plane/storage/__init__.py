"""Where the books are kept: ports of intent, and PostgreSQL behind them."""

__all__: list[str] = []
