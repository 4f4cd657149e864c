"""The store's tables in DuckDB.

Import this package only. It reads `store` and the ledger of `judges`.
"""

from resources.views.database import TABLES, connect, write_catalog

__all__ = ["TABLES", "connect", "write_catalog"]
