"""Sources: one module per corpus, which reads its files and yields clean records.

`scmdm.config.preparation.SOURCES` lists them by name; their interface is `scmdm.data.preparation.source.Source`.
"""
