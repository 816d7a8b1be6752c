"""Launch configurations as data: one table per architecture, chosen by kernel, dtype and width."""

from m4ov_kernels.configs.tables import (
    DEFAULT,
    FOLDER,
    Row,
    Table,
    find,
    forget,
    get,
    override,
    read,
    rows_of,
    shipped,
    table,
    write,
)

__all__ = [
    "DEFAULT",
    "FOLDER",
    "Row",
    "Table",
    "find",
    "forget",
    "get",
    "override",
    "read",
    "rows_of",
    "shipped",
    "table",
    "write",
]
